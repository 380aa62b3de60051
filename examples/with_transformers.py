"""The Trainer of Transformers: `optimizers=`, or a subclass with `create_optimizer`.

python examples/with_transformers.py
"""

import tempfile

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from rai_toolbox.constraints import MaxNorm
from rai_toolbox.optim import ProjectedOptimizer, constrain


class ConstrainedTrainer(Trainer):
    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        groups = constrain(model or self.model, {"classifier.weight": MaxNorm(0.2)})
        self.optimizer = ProjectedOptimizer(groups, torch.optim.AdamW, lr=self.args.learning_rate)
        return self.optimizer


if __name__ == "__main__":
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
    model = BertForSequenceClassification(
        BertConfig(vocab_size=20, num_hidden_layers=1, max_position_embeddings=8, **sizes)
    )
    words = torch.randint(0, 20, (64, 6))
    data = [{"input_ids": w, "labels": int(w[0] > 9)} for w in words]
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, learning_rate=0.02, num_train_epochs=2, use_cpu=True, report_to=[]
        )
        ConstrainedTrainer(model, settings, train_dataset=data).train()
    largest = model.classifier.weight.detach().norm(dim=1).max().item()
    assert largest <= 0.2, largest
    print(f"largest norm of rows: {largest}")
