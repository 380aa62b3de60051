"""The Trainer of Transformers, with a model of its own that is small."""

import pytest
import torch
from killing import die, killed_in
from tiers import slow_but
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from rai_toolbox.constraints import MaxNorm
from rai_toolbox.optim import ProjectedOptimizer, constrain

BOUND = 0.2


def model():
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=20,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            max_position_embeddings=8,
        )
    )


def data():
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(0, 20, (32, 6), generator=generator)
    return [{"input_ids": w, "labels": int(w[0] > 9)} for w in words]


def optimizer(of):
    return ProjectedOptimizer(
        constrain(of, {"classifier.weight": MaxNorm(BOUND)}), torch.optim.AdamW, lr=0.05
    )


def arguments(path, **settings):
    return TrainingArguments(
        output_dir=str(path),
        per_device_train_batch_size=4,
        num_train_epochs=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **{"save_strategy": "no", "dataloader_pin_memory": False, **settings},
    )


class Constraining(Trainer):
    def create_optimizer(self, model=None):
        self.optimizer = optimizer(self.model)
        return self.optimizer


def given(of, path, **settings):
    return Trainer(
        of, arguments(path, **settings), train_dataset=data(), optimizers=(optimizer(of), None)
    )


def hooked(of, path, **settings):
    return Constraining(of, arguments(path, **settings), train_dataset=data())


@pytest.mark.parametrize("make", slow_but([given, hooked]))
@pytest.mark.parametrize(
    "settings", slow_but([{}, {"gradient_accumulation_steps": 2}, {"bf16": True}])
)
def test_it_trains_within_the_set(make, settings, tmp_path):
    trained, untrained = model(), model()
    make(trained, tmp_path, **settings).train()
    assert not torch.equal(trained.classifier.weight, untrained.classifier.weight)
    assert (trained.classifier.weight.double().norm(dim=1) <= BOUND).all()
    free = trained.bert.embeddings.word_embeddings.weight
    assert free.norm(dim=1).max() > BOUND


def test_both_ways_are_one(tmp_path):
    first, second = model(), model()
    given(first, tmp_path).train()
    hooked(second, tmp_path).train()
    assert all(map(torch.equal, first.parameters(), second.parameters()))


@pytest.mark.slow
def test_a_run_that_goes_on_from_a_checkpoint_is_the_uninterrupted_one(tmp_path):
    whole, again = model(), model()
    hooked(whole, tmp_path, save_strategy="steps", save_steps=4).train()
    hooked(again, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert all(map(torch.equal, whole.parameters(), again.parameters()))


class Death(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, **others):
        if state.global_step == 5:
            die()


def killed(path):
    trainer = hooked(model(), path, save_strategy="steps", save_steps=2)
    trainer.add_callback(Death())
    trainer.train()


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_from_its_last_checkpoint(tmp_path):
    whole, again = model(), model()
    hooked(whole, tmp_path / "whole").train()
    killed_in(killed, tmp_path)
    found = {at.name for at in tmp_path.glob("checkpoint-*")}
    assert found == {"checkpoint-2", "checkpoint-4"}
    hooked(again, tmp_path).train(resume_from_checkpoint=True)
    assert all(map(torch.equal, whole.parameters(), again.parameters()))
