"""On a GPU: the same numbers as on a CPU, mixed precision, and no wait within a micro-batch."""

import json
from dataclasses import replace

import pytest
import torch
from compare import assert_close, sound
from test_update import (
    ALL,
    LENGTHS,
    OBJECTIVE,
    batches_of,
    examples,
    gradients,
    run_update,
    tiny_config,
)
from test_update import tiny_model as make_model
from toy import toy_recognizer, toy_rows

import ser
from ser.data.sampler import cut_update
from ser.models.multitask import HeadsConfig, MultiTaskModel
from ser.train.config import TrainConfig
from ser.train.distributed import World
from ser.train.loop import fit
from ser.train.optim import make_optimizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICE = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def full_precision():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_every_architecture_gives_what_it_gives_on_a_cpu_alone_and_in_a_batch(config, randomise):
    model = randomise(MultiTaskModel(config, HeadsConfig(4, 9, 3, pooling="mean+std"))).eval()
    batch, lengths = torch.stack([sound(5000, seed=i) for i in range(3)]), torch.tensor([5000, 3100, 400])
    with torch.no_grad():
        expected = model(batch, lengths)
        model.to(DEVICE)
        found = model(batch.to(DEVICE), lengths)
        alone = model(batch[1:2, :3100].to(DEVICE), lengths[1:2])
    assert_close(found.emotion.cpu(), expected.emotion, 1e-4)
    assert_close(found.emotion[1:2], alone.emotion, 1e-5)
    for row, frames in enumerate(expected.num_frames.tolist()):
        assert_close(found.ctc[row, :frames].cpu(), expected.ctc[row, :frames], 1e-4)


def updated(device, micro_batch, *, amp="off", config=None):
    """The gradient of one update, and what it said."""
    dtype = torch.float32 if amp != "off" else torch.float64
    model = make_model(config or tiny_config(), dtype).to(device)
    optimizer = make_optimizer(model, rate=1.0, head_rate=0.0, weight_decay=0.0, beta2=0.999)
    steps = cut_update(ALL, LENGTHS, world_size=1, micro_batch=micro_batch)
    scaler = torch.amp.GradScaler(device.type, init_scale=16.0, enabled=amp == "fp16")
    pool = [replace(example, waveform=example.waveform.to(dtype)) for example in examples()]
    batches = batches_of([ranks[0] for ranks in steps], pool)
    result = run_update(
        model, model, optimizer, batches, OBJECTIVE, World(device=device), scaler=scaler, amp=amp, seed=5, epoch=2
    )
    return {n: p.grad.detach().cpu().double() for n, p in model.named_parameters() if p.grad is not None}, result


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_the_gradient_is_that_of_a_cpu_however_the_update_is_cut(norm):
    config = tiny_config(feat_extract_norm=norm, conv_bias=norm == "layer")
    expected, _ = gradients(World(), ALL, 8, config=config)
    for micro_batch in (1, 3, 8):
        found, _ = updated(DEVICE, micro_batch, config=config)
        assert found.keys() == expected.keys()
        whole = torch.stack([grad.norm() for grad in expected.values()]).norm()
        for name, reference in expected.items():
            assert (found[name] - reference).norm() <= 1e-9 * reference.norm() + 1e-7 * whole, name


@pytest.mark.parametrize(("amp", "tolerance"), [("bf16", 0.1), ("fp16", 0.05)])
def test_mixed_precision_gives_about_the_same_gradient(amp, tolerance):
    expected, _ = gradients(World(), ALL, 8)
    found, result = updated(DEVICE, 4, amp=amp)
    assert not result.skipped
    total = torch.stack([grad.norm() for grad in expected.values()]).norm()
    apart = torch.stack([(found[name] - grad).norm() for name, grad in expected.items()]).norm()
    assert apart <= tolerance * total, float(apart / total)


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_nothing_in_a_micro_batch_waits_for_the_gpu(amp, monkeypatch):
    """Only reading the gradient's norm does, once in an update; dropout, masks, padding and heads are on.

    Without CTC: torch's own loss waits for the device, where it copies lengths to it.
    """
    dropouts = dict.fromkeys(("hidden_dropout", "attention_dropout", "activation_dropout", "final_dropout"), 0.1)
    model = make_model(tiny_config(**dropouts), torch.float32).to(DEVICE)
    optimizer = make_optimizer(model, rate=1e-4, head_rate=0.0, weight_decay=0.0, beta2=0.999)
    objective = replace(OBJECTIVE, weights=OBJECTIVE.weights | {"dimensions": 0.0, "ctc": 0.0}, class_weights=None)
    steps = cut_update(ALL, LENGTHS, world_size=1, micro_batch=3)
    scaler = torch.amp.GradScaler("cuda", enabled=amp == "fp16")
    pool = examples(dtype=torch.float32)

    def update():
        batches = [batch.pin_memory() for batch in batches_of([ranks[0] for ranks in steps], pool)]
        run_update(
            model, model, optimizer, batches, objective, World(device=DEVICE), scaler=scaler, amp=amp, clip=1.0
        )

    update()  # loads kernels
    unscale = scaler.unscale_

    def after_the_micro_batches(optimizer):
        torch.cuda.set_sync_debug_mode("default")
        return unscale(optimizer)

    monkeypatch.setattr(scaler, "unscale_", after_the_micro_batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        update()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_a_run_trains_resumes_and_predicts(tmp_path, amp):
    rows, valid = toy_rows(tmp_path, 12), toy_rows(tmp_path, 6, seed=1, name="valid")
    config = TrainConfig(epochs=2, effective_batch=4, rate=3e-3, log_every=1, amp=amp, device="cuda", beta=0.1)
    fit(toy_recognizer(), rows, valid, config, tmp_path / "run")
    longer = replace(config, epochs=3)
    result = fit(toy_recognizer(), rows, valid, longer, tmp_path / "run", allow_changes=["epochs"])
    assert result.resumed and result.progress.epoch == 3
    losses = [
        json.loads(line).get("loss_emotion") for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    ]
    assert all(value is None or 0 < value < 10 for value in losses)
    on_gpu = ser.load(tmp_path / "run/best", device="cuda").predict([row.file for row in valid])
    on_cpu = ser.load(tmp_path / "run/best").predict([row.file for row in valid])
    for a, b in zip(on_gpu, on_cpu, strict=True):
        assert a.probabilities == pytest.approx(b.probabilities, abs=1e-3)


def test_a_cache_filled_on_a_gpu_serves_it(tmp_path):
    rows = toy_rows(tmp_path, 12)
    config = TrainConfig(
        epochs=2, effective_batch=4, rate=3e-3, device="cuda", freeze="feature-encoder", cache=str(tmp_path / "c")
    )
    assert fit(toy_recognizer(), rows, [], config, tmp_path / "run").progress.step == 6
