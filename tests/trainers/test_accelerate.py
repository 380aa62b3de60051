"""Hugging Face Accelerate: `prepare` takes a constrained optimizer as it is."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from killing import die, killed_in
from tiny import by_hand, is_feasible, loader, net, optimizer, same
from torch import nn


@pytest.fixture(autouse=True)
def fresh():
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def trained(**settings):
    accelerator = Accelerator(cpu=True, step_scheduler_with_optimizer=False, **settings)
    model = net()
    opt = optimizer(model)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 3, 0.5)
    model, opt, schedule, batches = accelerator.prepare(model, opt, schedule, loader())
    for x, y in batches:
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.cross_entropy(model(x), y))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.1)
            opt.step()
            if accelerator.sync_gradients:
                schedule.step()
            opt.zero_grad()
    return accelerator, accelerator.unwrap_model(model), opt


@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_trains_as_a_loop_by_hand_does(accumulate):
    _, model, _ = trained(gradient_accumulation_steps=accumulate)
    assert same(model, by_hand(accumulate=accumulate, clip=0.1))
    assert is_feasible(model)


def test_bfloat16():
    _, model, _ = trained(mixed_precision="bf16")
    assert is_feasible(model)
    assert not same(model, net())


def test_a_saved_state_is_loaded(tmp_path):
    accelerator, model, opt = trained()
    accelerator.save_state(tmp_path)
    expected = [p.detach().clone() for p in model.parameters()]
    moments = [opt.state[p]["exp_avg"].clone() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
            opt.state[p]["exp_avg"].zero_()
    accelerator.load_state(tmp_path)
    assert all(map(torch.equal, model.parameters(), expected))
    pairs = zip(model.parameters(), moments, strict=True)
    assert all(torch.equal(opt.state[p]["exp_avg"], m) for p, m in pairs)


def kept(path, death=None):
    """Train for two epochs, from the last state that was saved; one is, every three steps."""
    accelerator = Accelerator(cpu=True, step_scheduler_with_optimizer=False)
    model = net()
    opt = optimizer(model)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 3, 0.5)
    model, opt, schedule, batches = accelerator.prepare(model, opt, schedule, loader())
    last = max((int(at.name) for at in path.iterdir()), default=0)
    if last:
        accelerator.load_state(path / str(last))
    step = last
    for _ in range(step // len(batches), 2):
        for x, y in accelerator.skip_first_batches(batches, step % len(batches)):
            accelerator.backward(nn.functional.cross_entropy(model(x), y))
            if step == death:
                die()
            opt.step()
            schedule.step()
            opt.zero_grad()
            step += 1
            if step % 3 == 0:
                accelerator.save_state(path / str(step))
    return accelerator.unwrap_model(model), step - last


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_from_its_last_checkpoint(tmp_path):
    killed_in(kept, tmp_path, 11)
    assert {at.name for at in tmp_path.iterdir()} == {"3", "6", "9"}
    model, steps = kept(tmp_path)
    assert steps == 16 - 9
    assert same(model, by_hand(epochs=2))
