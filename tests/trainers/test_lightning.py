"""Lightning's Trainer: a constrained optimizer is like any other."""

import lightning
import pytest
import torch
from killing import die, killed_in
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from tiny import by_hand, is_feasible, loader, net, optimizer, same, worst
from torch import nn

# What Lightning 2.6 says of its own code and settings; none of it is about optimizers.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*logging interval"),
]


class Automatic(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = net()

    def training_step(self, batch, _):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        opt = optimizer(self)
        schedule = torch.optim.lr_scheduler.StepLR(opt, 3, 0.5)
        return [opt], [{"scheduler": schedule, "interval": "step"}]


class Adversarial(Automatic):
    def training_step(self, batch, i):
        x, y = batch
        return super().training_step((worst(self.net, x, y), y), i)


class Manual(Automatic):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, i):
        opt, schedule = self.optimizers(), self.lr_schedulers()
        opt.zero_grad()
        self.manual_backward(super().training_step(batch, i))
        opt.step()
        schedule.step()


def fitted(module, tmp_path, ckpt_path=None, epochs=1, **settings):
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
        **settings,
    )
    trainer.fit(module, loader(), ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize("kind", [Automatic, Manual])
def test_it_trains_as_a_loop_by_hand_does(kind, tmp_path):
    module = kind()
    fitted(module, tmp_path)
    assert same(module.net, by_hand())
    assert is_feasible(module.net)


def test_adversarial_training_is_that_of_a_loop_by_hand(tmp_path):
    module = Adversarial()
    fitted(module, tmp_path)
    assert same(module.net, by_hand(adversarial=True)) and not same(module.net, by_hand())
    assert is_feasible(module.net)


def test_accumulated_and_clipped_gradients(tmp_path):
    module = Automatic()
    fitted(module, tmp_path, accumulate_grad_batches=2, gradient_clip_val=0.1)
    # (the norm of all gradients is summed in the order of the optimizer's groups)
    for p, expected in zip(
        module.net.parameters(), by_hand(accumulate=2, clip=0.1).parameters(), strict=True
    ):
        torch.testing.assert_close(p, expected, rtol=0, atol=1e-6)
    assert is_feasible(module.net)


def test_a_run_that_goes_on_from_a_checkpoint_is_the_uninterrupted_one(tmp_path):
    first, whole, again = Automatic(), Automatic(), Automatic()
    fitted(first, tmp_path, epochs=1).save_checkpoint(tmp_path / "half.ckpt")
    fitted(whole, tmp_path, epochs=2)
    fitted(again, tmp_path, ckpt_path=tmp_path / "half.ckpt", epochs=2)
    assert same(whole.net, again.net)
    assert not same(first.net, again.net)


def test_bfloat16(tmp_path):
    module = Automatic()
    fitted(module, tmp_path, precision="bf16-mixed")
    assert is_feasible(module.net)
    assert not same(module.net, net())


class Death(Callback):
    def on_before_optimizer_step(self, trainer, module, opt):
        if trainer.global_step == 19:  # 8 steps an epoch
            die()


def kept(path, *more):
    """Two of three epochs leave a checkpoint before `Death`."""
    module = Automatic()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=3,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(path, save_last=True), *more],
    )
    trainer.fit(module, loader(), ckpt_path="last" if any(path.iterdir()) else None)
    return module, trainer.global_step


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_run_that_was_killed_goes_on_from_its_last_checkpoint(tmp_path):
    killed_in(kept, tmp_path, Death())
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 16
    module, steps = kept(tmp_path)
    assert steps == 24
    assert same(module.net, by_hand(epochs=3))
