"""Lightning's automatic optimisation, with nothing but ``convert`` and the wrapped optimizer: the plain loop's bits."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import LIGHTNINGS_OWN_WARNINGS
from loops import ALGORITHMS, adam, batches, classification, halving, network, plain_loop, same_bits, samples
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import torch2ebm

L = pytest.importorskip("lightning")

pytestmark = pytest.mark.filterwarnings(*LIGHTNINGS_OWN_WARNINGS)
every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)


class Classifier(L.LightningModule):
    def __init__(self, algorithm: torch2ebm.Algorithm) -> None:
        super().__init__()
        self.net = network()
        self.model = torch2ebm.convert(self.net)
        self.algorithm = algorithm

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.model(x), y)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch2ebm.EnergyOptimizer(adam(self.net.parameters()), self.model, self.algorithm)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": halving(optimizer), "interval": "step"}}


def loader() -> Any:
    return DataLoader(TensorDataset(*samples()), batch_size=5)


def trainer(folder: Path, **settings: Any) -> Any:
    settings = {"max_epochs": 1, "enable_checkpointing": False, **settings}
    return L.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


@every_algorithm
@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_weights_and_schedule_are_the_plain_loops(
    algorithm: torch2ebm.Algorithm, clip: float | None, accumulate: int, tmp_path: Path
) -> None:
    module = Classifier(algorithm)
    fit = trainer(tmp_path, max_epochs=2, accumulate_grad_batches=accumulate, gradient_clip_val=clip)
    fit.fit(module, loader())
    net, optimizer = plain_loop(algorithm, batches(), epochs=2, accumulate=accumulate, clip=clip)
    assert same_bits(module.net, net)
    assert fit.optimizers[0].param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


@every_algorithm
def test_a_resumed_run_is_the_straight_one(algorithm: torch2ebm.Algorithm, tmp_path: Path) -> None:
    """Stopped after one epoch of three; the checkpoint is read with ``weights_only=True``, Lightning's too."""
    first = trainer(tmp_path)
    first.fit(Classifier(algorithm), loader())
    path = tmp_path / "half.ckpt"
    first.save_checkpoint(path)
    straight, resumed, fresh = Classifier(algorithm), Classifier(algorithm), Classifier(algorithm)
    runs = [trainer(tmp_path, max_epochs=3) for _ in range(3)]
    runs[0].fit(straight, loader())
    runs[1].fit(resumed, loader(), ckpt_path=path, weights_only=True)
    assert same_bits(resumed.net, straight.net)
    assert torch2ebm_of(runs[1]).param_groups[0]["lr"] == torch2ebm_of(runs[0]).param_groups[0]["lr"]
    fresh.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    runs[2].fit(fresh, loader())  # the negative twin: weights without the optimizer's state
    assert not same_bits(fresh.net, straight.net)


def torch2ebm_of(fitted: Any) -> torch2ebm.EnergyOptimizer:
    (optimizer,) = fitted.optimizers
    assert isinstance(optimizer, torch2ebm.EnergyOptimizer)
    return optimizer


def test_the_optimizer_of_a_checkpoint_loads_into_the_bare_one_and_is_refused_by_another(tmp_path: Path) -> None:
    fitted = trainer(tmp_path)
    fitted.fit(Classifier(ALGORITHMS["PredictiveCoding"]), loader())
    fitted.save_checkpoint(tmp_path / "whole.ckpt")
    (saved,) = torch.load(tmp_path / "whole.ckpt", weights_only=True)["optimizer_states"]
    bare = adam(network().parameters())
    bare.load_state_dict(saved)
    torch.testing.assert_close(bare.state_dict()["state"], torch2ebm_of(fitted).state_dict()["state"], rtol=0, atol=0)
    with pytest.raises(torch2ebm.errors.CheckpointError, match="a checkpoint of PredictiveCoding"):
        trainer(tmp_path, max_epochs=2).fit(
            Classifier(ALGORITHMS["ZeroDivergence"]), loader(), ckpt_path=tmp_path / "whole.ckpt", weights_only=True
        )


def copied(optimizer: torch2ebm.EnergyOptimizer) -> torch2ebm.EnergyOptimizer:
    return copy.deepcopy(optimizer)


def pickled(optimizer: torch2ebm.EnergyOptimizer) -> torch2ebm.EnergyOptimizer:
    return pickle.loads(pickle.dumps(optimizer))


@pytest.mark.parametrize("through", [copied, pickled])
def test_a_copy_of_the_optimizer_that_lightning_holds_goes_on_as_the_plain_loop(through: Any, tmp_path: Path) -> None:
    fitted = trainer(tmp_path)
    fitted.fit(Classifier(ALGORITHMS["PredictiveCoding"]), loader())
    _, theirs = plain_loop(ALGORITHMS["PredictiveCoding"], batches())
    ours = through(torch2ebm_of(fitted))
    assert ours.model is not torch2ebm_of(fitted).model
    for optimizer in (ours, theirs):
        optimizer.zero_grad()
        x, y = batches()[0]
        F.cross_entropy(optimizer.model.train()(x), y).backward()
        optimizer.step()
    assert same_bits(ours.model, theirs.model)


def test_validation_runs_the_module_itself_between_steps(tmp_path: Path) -> None:
    """In evaluation mode without gradients, and the training that follows is not disturbed."""
    seen: list[Tensor] = []

    class Validated(Classifier):
        def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
            seen.append(self.model(batch[0]))
            assert not self.model.training and torch.equal(seen[-1], self.net(batch[0]))

    module = Validated(ALGORITHMS["PredictiveCoding"])
    trainer(tmp_path, max_epochs=2, val_check_interval=2).fit(module, loader(), loader())
    assert len(seen) > 8
    assert same_bits(module.net, plain_loop(ALGORITHMS["PredictiveCoding"], batches(), epochs=2)[0])


def test_mixed_precision_is_the_plain_loop_under_autocast(tmp_path: Path) -> None:
    module = Classifier(ALGORITHMS["PredictiveCoding"])
    trainer(tmp_path, precision="bf16-mixed").fit(module, loader())

    def in_bfloat16(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return classification(model, x, y)

    assert same_bits(module.net, plain_loop(ALGORITHMS["PredictiveCoding"], batches(), loss=in_bfloat16)[0])
    assert not same_bits(module.net, plain_loop(ALGORITHMS["PredictiveCoding"], batches())[0])


class Skipping(Classifier):
    """Looks at every batch, and learns from one in two."""

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor | None:
        loss = super().training_step(batch, index)
        return None if index % 2 else loss


@every_algorithm
@pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning:lightning\\.pytorch\\.loops.*")
def test_a_batch_that_training_step_skips_teaches_nothing(algorithm: torch2ebm.Algorithm, tmp_path: Path) -> None:
    """Batch statistics and schedule move on, as they do under backpropagation."""
    module, net = Skipping(algorithm), network()
    trainer(tmp_path).fit(module, loader())
    model = torch2ebm.convert(net)
    optimizer = torch2ebm.EnergyOptimizer(adam(net.parameters()), model, algorithm)
    scheduler = halving(optimizer)
    for index, batch in enumerate(batches()):
        if index % 2:
            model.feedforward(batch[0])
        else:
            classification(model, *batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        scheduler.step()
    assert same_bits(module.net, net)


class Again(Classifier):
    def configure_optimizers(self) -> dict[str, Any]:
        self.model.detach()
        return super().configure_optimizers()


def test_a_second_fit_of_a_module_needs_a_detach_while_the_first_trainer_is_there(tmp_path: Path) -> None:
    """``configure_optimizers`` is called again: a second optimizer, for a model that has an algorithm."""
    algorithm = ALGORITHMS["PredictiveCoding"]
    refused, again, after = Classifier(algorithm), Again(algorithm), Classifier(algorithm)
    kept = [trainer(tmp_path) for _ in range(3)]
    kept[0].fit(refused, loader())
    with pytest.raises(torch2ebm.errors.AttachmentError, match=r"detach\(\)"):
        trainer(tmp_path).fit(refused, loader())
    for each in kept[1:]:
        each.fit(again, loader())
    for _ in range(2):
        trainer(tmp_path).fit(after, loader())
    first = plain_loop(algorithm, batches())[0]
    twice = plain_loop(algorithm, batches(), net=first)[0]
    assert same_bits(again.net, twice) and same_bits(after.net, twice)


# ---- two processes; run as a script, this file is what starts them


class Sharded(Classifier):
    """Without batch statistics, which each process takes from its own part."""

    def __init__(self, algorithm: torch2ebm.Algorithm) -> None:
        super().__init__(algorithm)
        self.net = without_statistics()
        self.model = torch2ebm.convert(self.net)

    def train_dataloader(self) -> Any:
        data = TensorDataset(*samples())
        return DataLoader(data, batch_size=5, sampler=DistributedSampler(data, shuffle=False))


def without_statistics() -> nn.Sequential:
    net = network()
    return nn.Sequential(net[0], net[2], net[3])


def train_in_two_processes(folder: Path) -> None:
    module = Sharded(ALGORITHMS["PredictiveCoding"])
    fitted = trainer(folder, devices=2, strategy="ddp_fork", use_distributed_sampler=False)
    fitted.fit(module)
    torch.save(module.net.state_dict(), folder / "weights.pt")


@pytest.mark.slow
def test_two_processes_are_the_plain_loop_on_the_whole_batch(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, __file__, str(tmp_path)], check=True, env=environment, timeout=120)
    found = without_statistics()
    found.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    expected, _ = plain_loop(ALGORITHMS["PredictiveCoding"], batches(10), net=without_statistics())
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    train_in_two_processes(Path(sys.argv[1]))
