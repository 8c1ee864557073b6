"""The Hugging Face ``Trainer`` on a BERT that owns its loss: the plain loop's bits, and 2 times 5 is 1 times 10."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loops import ALGORITHMS, halving
from torch import Tensor, nn

import torch2ebm

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)


def bert(dropout: float = 0.0) -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=30,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
        num_labels=3,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.BertForSequenceClassification(config)


def texts(count: int = 20) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(30, (count, 6), generator=generator)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[0] % 3} for row in tokens]


class Recording:
    """A collator that keeps the batches, so that the plain loop sees them in the trainer's order."""

    def __init__(self) -> None:
        self.batches: list[dict[str, Tensor]] = []

    def __call__(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        self.batches.append({name: torch.stack([row[name] for row in rows]) for name in rows[0]})
        return self.batches[-1]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01)


class Run:
    def __init__(
        self, algorithm: torch2ebm.Algorithm, folder: Path, dropout: float = 0.0, make: Any = sgd, **settings: Any
    ) -> None:
        self.net = bert(dropout)
        self.model = torch2ebm.convert(self.net)
        self.optimizer = torch2ebm.EnergyOptimizer(make(self.net.parameters()), self.model, algorithm)
        self.scheduler = halving(self.optimizer)
        self.collator = Recording()
        self.trainer = transformers.Trainer(
            model=self.model,
            args=transformers.TrainingArguments(
                output_dir=str(folder),
                use_cpu=True,
                report_to=[],
                disable_tqdm=True,
                **{"max_grad_norm": 0.0, "num_train_epochs": 1, "save_strategy": "no", **settings},
            ),
            train_dataset=texts(),
            eval_dataset=texts(10),
            data_collator=self.collator,
            optimizers=(self.optimizer, self.scheduler),
        )


def by_hand(
    algorithm: torch2ebm.Algorithm, data: list[dict[str, Tensor]], accumulate: int = 1, clip: float | None = None
) -> nn.Module:
    net = bert()
    model = torch2ebm.convert(net)
    optimizer = torch2ebm.EnergyOptimizer(sgd(net.parameters()), model, algorithm, accumulation=accumulate)
    scheduler = halving(optimizer)
    for index, batch in enumerate(data):
        (model(**batch).loss / accumulate).backward()
        if (index + 1) % accumulate == 0:
            if clip is not None:
                nn.utils.clip_grad_norm_(net.parameters(), clip)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return net


def assert_equal(ours: nn.Module, theirs: nn.Module, tolerance: float = 0.0) -> None:
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=tolerance, atol=tolerance)


@every_algorithm
@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (2, 0.1)])
def test_weights_are_the_plain_loops(
    algorithm: torch2ebm.Algorithm, accumulate: int, clip: float | None, tmp_path: Path
) -> None:
    run = Run(
        algorithm,
        tmp_path,
        per_device_train_batch_size=5,
        gradient_accumulation_steps=accumulate,
        max_grad_norm=clip or 0.0,
    )
    run.trainer.train()
    assert_equal(run.net, by_hand(algorithm, run.collator.batches, accumulate, clip))


def test_predictive_coding_with_nothing_set_learns(tmp_path: Path) -> None:
    """The loss is inside of the last node; a nudge that did not find its curvature would warn, which is an error."""
    settings = {"per_device_train_batch_size": 10, "num_train_epochs": 20}
    run = Run(torch2ebm.PredictiveCoding(), tmp_path, make=adam, **settings)
    run.scheduler.step_size = 1000
    before = run.trainer.evaluate()["eval_loss"]
    run.trainer.train()
    assert run.model.state.relaxation.sigma_squared > 0
    assert 0 < run.model.state.relaxation.r <= 0.1 * (1 + 1e-6)
    assert run.trainer.evaluate()["eval_loss"] < 0.5 * before


def test_the_loss_inside_is_the_loss_outside() -> None:
    """In double precision: nudge and gradients of ``PredictiveCoding()`` with nothing set."""
    rows = texts(10)
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    labels = batch.pop("labels")
    found = []
    for inside in (True, False):
        net = bert().double()
        model = torch2ebm.convert(net)
        model.attach(torch2ebm.PredictiveCoding())
        loss = model(**batch, labels=labels).loss if inside else F.cross_entropy(model(**batch).logits, labels)
        loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in net.parameters()])
        found.append((model.state.relaxation.sigma_squared, gradients))
    (ours, gradients), (theirs, expected) = found
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert float((gradients - expected).norm() / expected.norm()) < 1e-6


def of_batches(accumulate: int, folder: Path) -> nn.Module:
    """Steps of 10 samples, in ``accumulate`` parts."""
    run = Run(
        ALGORITHMS["PredictiveCoding"],
        folder,
        per_device_train_batch_size=10 // accumulate,
        gradient_accumulation_steps=accumulate,
    )
    run.trainer.train()
    assert [len(batch["labels"]) for batch in run.collator.batches] == [10 // accumulate] * 2 * accumulate
    return run.net


def test_two_batches_of_five_are_one_of_ten(tmp_path: Path) -> None:
    assert_equal(of_batches(2, tmp_path), of_batches(1, tmp_path), 1e-6)


def test_a_model_that_said_it_takes_loss_arguments_would_learn_twice_as_fast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative twin: the trainer would leave the division by the number of batches to the model."""
    monkeypatch.setattr(torch2ebm.EnergyModel, "accepts_loss_kwargs", True)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        assert_equal(of_batches(2, tmp_path), of_batches(1, tmp_path), 1e-3)


def test_a_resumed_run_is_the_straight_one(tmp_path: Path) -> None:
    """With dropout: model, optimizer, schedule and generators come from the checkpoint."""
    settings = {"per_device_train_batch_size": 5, "save_strategy": "steps", "save_steps": 2}
    straight, resumed, fresh = (
        Run(ALGORITHMS["PredictiveCoding"], tmp_path, dropout=0.2, **settings) for _ in range(3)
    )
    straight.trainer.train()
    bare = sgd(straight.net.parameters())
    bare.load_state_dict(torch.load(tmp_path / "checkpoint-4" / "optimizer.pt", weights_only=True))
    momentum = straight.optimizer.state_dict()["state"]
    torch.testing.assert_close(bare.state_dict()["state"], momentum, rtol=0, atol=0)
    checkpoint = tmp_path / "checkpoint-2"
    resumed.trainer.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.trainer.state.global_step == 4 and len(resumed.collator.batches) == 2
    assert_equal(resumed.net, straight.net)
    rates = [run.optimizer.param_groups[0]["lr"] for run in (resumed, straight)]
    assert rates == [0.025, 0.025]
    (checkpoint / "optimizer.pt").unlink()  # the negative twin
    fresh.trainer.train(resume_from_checkpoint=str(checkpoint))
    with pytest.raises(AssertionError, match="Tensor-likes are not equal"):
        assert_equal(fresh.net, straight.net)


def test_columns_that_forward_does_not_take_are_left_out(tmp_path: Path) -> None:
    """The trainer asks the converted model what its module takes; the negative twin does not ask."""
    algorithm = ALGORITHMS["PredictiveCoding"]
    asked, unasked = (
        Run(algorithm, tmp_path, per_device_train_batch_size=5, remove_unused_columns=removed)
        for removed in (True, False)
    )
    for run in (asked, unasked):
        run.trainer.train_dataset = [{**text, "length": torch.tensor(6)} for text in texts()]
        run.trainer.train()
    assert all(batch.keys() == texts()[0].keys() for batch in asked.collator.batches)
    assert all("length" in batch for batch in unasked.collator.batches)
    assert_equal(asked.net, by_hand(algorithm, asked.collator.batches))


def test_evaluation_and_prediction_are_the_modules_own(tmp_path: Path) -> None:
    run = Run(ALGORITHMS["PredictiveCoding"], tmp_path, per_device_eval_batch_size=10)
    found = run.trainer.evaluate()
    predicted = run.trainer.predict(texts(10)).predictions
    (batch,) = run.collator.batches[:1]
    with torch.no_grad():
        expected = run.net.eval()(**batch)
    assert found["eval_loss"] == expected.loss.item()
    torch.testing.assert_close(torch.from_numpy(predicted), expected.logits, rtol=0, atol=0)


def test_what_the_trainer_saves_the_unconverted_model_loads(tmp_path: Path) -> None:
    run = Run(ALGORITHMS["ZeroDivergence"], tmp_path, per_device_train_batch_size=10)
    run.trainer.train()
    folder = str(tmp_path / "saved")
    run.trainer.save_model(folder)
    run.net.config.save_pretrained(folder)
    assert_equal(transformers.BertForSequenceClassification.from_pretrained(folder), run.net)


def copied(optimizer: torch2ebm.EnergyOptimizer) -> torch2ebm.EnergyOptimizer:
    return copy.deepcopy(optimizer)


def pickled(optimizer: torch2ebm.EnergyOptimizer) -> torch2ebm.EnergyOptimizer:
    return pickle.loads(pickle.dumps(optimizer))


def test_copies_of_the_optimizer_that_the_trainer_holds_go_on_as_it_does(tmp_path: Path) -> None:
    run = Run(ALGORITHMS["PredictiveCoding"], tmp_path, per_device_train_batch_size=10)
    run.trainer.train()
    held = run.trainer.optimizer.optimizer
    assert held is run.optimizer
    copies = [copied(held), pickled(held)]
    before = copy.deepcopy(run.net)
    for optimizer in (held, *copies):
        optimizer.zero_grad()
        optimizer.model(**run.collator.batches[0]).loss.backward()
        optimizer.step()
    for optimizer in copies:
        assert_equal(optimizer.model, run.net)
    with pytest.raises(AssertionError, match="Tensor-likes are not equal"):
        assert_equal(run.net, before)
