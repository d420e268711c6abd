"""What one update computes does not depend on how its work is split (N3; FAULTS D2, D3, F1)."""

import math
import platform
import resource
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ser.data.dataset import Example, collate
from ser.data.labels import NO_LABEL
from ser.data.sampler import cut_update
from ser.errors import ConfigError
from ser.models.config import Wav2Vec2Config
from ser.models.multitask import HeadsConfig, MultiTaskModel
from ser.train import update
from ser.train.checkpoint import Progress
from ser.train.distributed import World
from ser.train.losses import Objective
from ser.train.optim import make_optimizer, set_rate
from ser.train.update import Learner

LENGTHS = [9000, 7000, 6500, 5000, 4000, 3000, 1200, 800]


def tiny_config(**changes):
    settings = {
        "conv_dim": (8, 8, 8),
        "conv_kernel": (10, 8, 4),
        "conv_stride": (5, 8, 4),
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "num_conv_pos_embeddings": 8,
        "num_conv_pos_embedding_groups": 4,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "final_dropout": 0.0,
        "layerdrop": 0.0,
        "mask_time_prob": 0.3,
        "mask_time_length": 3,
        "mask_feature_prob": 0.2,
        "mask_feature_length": 4,
    }
    return Wav2Vec2Config(**(settings | changes))


def tiny_model(config, dtype=torch.float64):
    torch.manual_seed(0)
    heads = HeadsConfig(num_emotions=4, vocab_size=9, num_speakers=3, num_dimensions=3, pooling="mean+std")
    return MultiTaskModel(config, heads).to(dtype).train()


def dimensions_of(i):
    """Arousal of all but one, dominance of three, and a valence that never varies."""
    return [math.nan if i == 4 else 1.0 + (i * 0.7) % 4, 0.3 * i if i in (0, 3, 5) else math.nan, 3.0]


def examples(*, without=(), dtype=torch.float64):
    """Eight utterances. Some lack labels; one transcript (of the shortest) cannot fit its frames."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for i, length in enumerate(LENGTHS):
        found.append(
            Example(
                index=i,
                place=i,
                weight=1.0,
                waveform=torch.randn(length, generator=generator, dtype=dtype),
                labels={
                    "emotion": NO_LABEL if i in (1, 6) or "emotion" in without else i % 4,
                    "speaker": NO_LABEL if i in (0, 3, 4) or "speaker" in without else i % 3,
                    "dimensions": dimensions_of(i) if "dimensions" not in without else [math.nan] * 3,
                    "ctc": []
                    if i == 2 or "ctc" in without
                    else [1, 1, 2, 3, 3, 5][: 2 + i % 5]
                    if i < 7
                    else [4] * 30,
                },
            )
        )
    return found


OBJECTIVE = Objective(
    weights={"emotion": 1.0, "ctc": 0.1, "speaker": 0.3, "dimensions": 2.0},
    label_smoothing=0.1,
    class_weights=torch.tensor([0.5, 1.0, 2.0, 1.5], dtype=torch.float64),
)


def run_update(wrapped, model, optimizer, batches, objective, world, *, scaler, epoch=0, step=0, **options):
    """`ser.train.update.run_update` of these parts."""
    learner = Learner(model, wrapped, optimizer, scaler, objective, world, **options)
    return update.run_update(learner, batches, Progress(step=step, epoch=epoch))


def batches_of(rank_steps, pool):
    return [
        collate([Example(**{**vars(pool[i]), "weight": weight}) for i, weight, *_ in items])
        for items in rank_steps
    ]


def gradients(world, update, micro_batch, *, config=None, pool=None):
    """The gradient of one update, cut for ``world``, as a flat dict; and the total loss over ranks."""
    model = tiny_model(config or tiny_config())
    wrapped = world.wrap(model)
    optimizer = make_optimizer(model, rate=1.0, head_rate=0.0, weight_decay=0.0, beta2=0.999)  # lr stays 0
    steps = cut_update(update, LENGTHS, world_size=world.size, micro_batch=micro_batch)
    mine = batches_of([ranks[world.rank] for ranks in steps], pool or examples())
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    result = run_update(
        wrapped, model, optimizer, mine, OBJECTIVE, world, scaler=scaler, clip=0.0, seed=5, epoch=2
    )
    none = torch.zeros((), dtype=torch.float64)
    losses = torch.stack([result.losses.get(name, none).double() for name in OBJECTIVE.weights])
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, world.sum(losses)


def assert_same_gradients(found, expected):
    """Tighter than N3 asks: per parameter 1e-10 of its own norm plus 1e-10 of the whole gradient's (float64)."""
    assert found.keys() == expected.keys()
    whole = torch.stack([g.norm() for g in expected.values()]).norm()
    for name, reference in expected.items():
        error = (found[name] - reference).norm()
        assert error <= 1e-10 * reference.norm() + 1e-10 * whole, f"{name}: {error:.2e} of {reference.norm():.2e}"


def run_ranks(function, world_size, tmp_path, *arguments):
    """``function(world, *arguments)`` on real gloo processes; returns what each rank returned."""
    mp.start_processes(
        _rank, args=(world_size, str(tmp_path), function, arguments), nprocs=world_size, start_method="spawn"
    )
    return [torch.load(tmp_path / f"result{rank}.pt") for rank in range(world_size)]


def _rank(rank, world_size, folder, function, arguments):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
    try:
        result = function(World(rank=rank, size=world_size), *arguments)
        torch.save(result, f"{folder}/result{rank}.pt")
    finally:
        dist.destroy_process_group()


ALL = list(range(8))


@pytest.fixture(scope="module")
def whole():
    return gradients(World(), ALL, 8)


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 5, 7])
def test_the_gradient_does_not_depend_on_the_micro_batches(whole, micro_batch):
    found, losses = gradients(World(), ALL, micro_batch)
    assert_same_gradients(found, whole[0])
    torch.testing.assert_close(losses, whole[1], rtol=1e-10, atol=0)


def splits_on_ranks(world):
    """Everything that needs several processes, in one start of them."""
    found = {
        "2 ranks": gradients(world, ALL, 4),
        "2 ranks x 2": gradients(world, ALL, 2),
        "2 ranks x 4": gradients(world, ALL, 1),
        "uneven": gradients(world, ALL, 3),
        "partial": gradients(world, [0, 3, 5], 1),
        "one utterance": gradients(world, [4], 1),
        "ctc on no rank's share": gradients(world, [2, 7], 1),  # no text; text that does not fit
        "labels on one rank only": gradients(world, [0, 1], 1),
        "no emotion at all": gradients(world, ALL, 2, pool=examples(without=("emotion",))),
        "one arousal": gradients(world, [4, 6], 1),
        "large style": gradients(
            world, ALL, 2, config=tiny_config(feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True)
        ),
    }
    return found, parameters_after_training(world), synchronisations(world)


def synchronisations(world):
    """For each micro-batch of an update, whether its gradients are exchanged."""
    model = tiny_model(tiny_config())
    wrapped = world.wrap(model)
    seen = []
    model.register_forward_pre_hook(lambda *_: seen.append(wrapped.require_backward_grad_sync))
    optimizer = make_optimizer(model, rate=1.0, head_rate=0.0, weight_decay=0.0, beta2=0.999)
    steps = cut_update(ALL, LENGTHS, world_size=world.size, micro_batch=1)
    mine = batches_of([ranks[world.rank] for ranks in steps], examples())
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    run_update(wrapped, model, optimizer, mine, OBJECTIVE, world, scaler=scaler)
    return seen


def parameters_after_training(world):
    """Weights after steps with LayerDrop, dropout, checkpointing, a frozen part and updates that lack labels."""
    torch.manual_seed(0)
    config = tiny_config(layerdrop=0.5, hidden_dropout=0.2, attention_dropout=0.1, activation_dropout=0.1)
    model = tiny_model(config)
    model.freeze("feature-encoder")
    model.wav2vec2.activation_checkpointing(True)
    wrapped = world.wrap(model)
    optimizer = make_optimizer(model, rate=1e-2, head_rate=0.0, weight_decay=0.1, beta2=0.999)
    set_rate(optimizer, 1.0)
    snapshots = []
    everything = ("ctc", "speaker", "emotion", "dimensions")
    for step, without in enumerate([(), ("ctc",), ("emotion", "speaker", "dimensions"), (), everything, ()]):
        steps = cut_update(ALL, LENGTHS, world_size=world.size, micro_batch=2)
        mine = batches_of([ranks[world.rank] for ranks in steps], examples(without=without))
        run_update(
            wrapped,
            model,
            optimizer,
            mine,
            OBJECTIVE,
            world,
            scaler=torch.amp.GradScaler("cpu", enabled=False),
            clip=1.0,
            seed=0,
            step=step,
        )
        snapshots.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    return snapshots


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory):
    return run_ranks(splits_on_ranks, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", ["2 ranks", "2 ranks x 2", "2 ranks x 4", "uneven"])
def test_the_gradient_does_not_depend_on_the_ranks(whole, on_two_ranks, case):
    for found, *_ in on_two_ranks:
        gradient, losses = found[case]
        assert_same_gradients(gradient, whole[0])
        torch.testing.assert_close(losses, whole[1], rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("case", "update"),
    [
        ("partial", [0, 3, 5]),
        ("one utterance", [4]),
        ("ctc on no rank's share", [2, 7]),
        ("labels on one rank only", [0, 1]),
        ("one arousal", [4, 6]),
    ],
)
def test_a_small_or_poorly_labelled_update_has_the_same_gradient_on_two_ranks(on_two_ranks, case, update):
    expected, _ = gradients(World(), update, 8)
    for found, *_ in on_two_ranks:
        assert_same_gradients(found[case][0], expected)


def test_the_split_does_not_matter_in_the_layer_norm_style_either(on_two_ranks):
    config = tiny_config(feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True)
    expected, _ = gradients(World(), ALL, 8, config=config)
    for found, *_ in on_two_ranks:
        assert_same_gradients(found["large style"][0], expected)


def test_a_head_without_any_label_in_the_update_has_no_gradient_on_any_rank(on_two_ranks):
    for found, *_ in on_two_ranks:
        assert not any(name.startswith("cls_head") for name in found["no emotion at all"][0])
        assert any(name.startswith("speaker_head") for name in found["no emotion at all"][0])


def test_weights_stay_equal_on_all_ranks_with_layerdrop_frozen_parts_and_missing_labels(on_two_ranks):
    first, second = (snapshots for _, snapshots, _ in on_two_ranks)
    for step, (a, b) in enumerate(zip(first, second, strict=True)):
        assert torch.equal(a, b), f"ranks differ after update {step}"
    assert not torch.equal(first[0], first[1])
    assert torch.isfinite(first[-1]).all()


def test_gradients_are_exchanged_once_per_update(on_two_ranks):
    # The first four are the pass without gradient that the dimensions' loss needs, on the model itself.
    assert [seen[4:] for *_, seen in on_two_ranks] == [[False, False, False, True]] * 2


def test_a_head_without_labels_is_left_out_of_the_optimizer_step():
    """Neither weight decay nor momentum moves it: a zero gradient is not no gradient."""
    model = tiny_model(tiny_config())
    optimizer = make_optimizer(model, rate=1e-2, head_rate=0.0, weight_decay=0.5, beta2=0.999)
    set_rate(optimizer, 1.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for without, moves in [((), True), (("speaker",), False), ((), True)]:
        before = model.speaker_head.weight.clone()
        encoder_before = model.wav2vec2.encoder.layers[0].feed_forward.output_dense.weight.clone()
        run_update(
            model, model, optimizer, [collate(examples(without=without))], OBJECTIVE, World(), scaler=scaler
        )
        assert torch.equal(before, model.speaker_head.weight) != moves
        assert not torch.equal(encoder_before, model.wav2vec2.encoder.layers[0].feed_forward.output_dense.weight)


def test_an_update_without_any_label_moves_nothing():
    """Neither decay nor momentum: heads, what they read, and the encoder have no gradient at all."""
    model = tiny_model(tiny_config())
    optimizer = make_optimizer(model, rate=1e-2, head_rate=0.0, weight_decay=0.5, beta2=0.999)
    set_rate(optimizer, 1.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    bare = examples(without=("emotion", "ctc", "speaker", "dimensions"))
    for pool, moves in [(examples(), True), (bare, False), (examples(), True)]:
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        run_update(model, model, optimizer, [collate(pool)], OBJECTIVE, World(), scaler=scaler)
        assert any(not torch.equal(before[n], p) for n, p in model.named_parameters()) == moves


def test_an_update_whose_concordance_is_undefined_moves_nothing():
    """One labelled utterance, as in a last small update: no gradient is not a zero gradient."""
    model = tiny_model(tiny_config())
    optimizer = make_optimizer(model, rate=1e-2, head_rate=0.0, weight_decay=0.5, beta2=0.999)
    set_rate(optimizer, 1.0)
    objective = Objective(weights={"emotion": 0.0, "ctc": 0.0, "speaker": 0.0, "dimensions": 1.0})
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for pool, moves in [(examples(), True), (examples()[6:7], False)]:
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        result = run_update(model, model, optimizer, [collate(pool)], objective, World(), scaler=scaler)
        assert any(not torch.equal(before[n], p) for n, p in model.named_parameters()) == moves
    assert float(result.losses["dimensions"]) == 0.0


def test_the_gradient_of_dimensions_is_that_of_the_concordance_of_the_whole_update():
    """Written out: one differentiable pass over all eight utterances, alone, and 1 - CCC by numpy's moments."""
    model = tiny_model(tiny_config())
    optimizer = make_optimizer(model, rate=0.0, head_rate=0.0, weight_decay=0.0, beta2=0.999)
    objective = Objective(weights={"emotion": 0.0, "ctc": 0.0, "speaker": 0.0, "dimensions": 2.0})
    pool = examples()
    steps = cut_update(ALL, LENGTHS, world_size=1, micro_batch=3)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    batches = batches_of([ranks[0] for ranks in steps], pool)
    model.eval()  # without masks
    result = run_update(model, model, optimizer, batches, objective, World(), scaler=scaler)
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    predictions = torch.cat([model(e.waveform[None]).dimensions for e in pool])
    loss = torch.zeros((), dtype=torch.float64)
    for d in range(2):  # the third does not vary
        rows = [i for i in ALL if math.isfinite(pool[i].labels["dimensions"][d])]
        p = predictions[rows, d]
        y = torch.tensor([pool[i].labels["dimensions"][d] for i in rows], dtype=torch.float64)
        covariance = ((p - p.mean()) * (y - y.mean())).mean()
        ccc = 2 * covariance / (p.var(correction=0) + y.var(correction=0) + (p.mean() - y.mean()) ** 2)
        loss = loss + (1 - ccc) / 3
    torch.testing.assert_close(result.losses["dimensions"], loss.detach(), rtol=1e-9, atol=0)
    (2.0 * loss).backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_same_gradients({n: found[n] for n in expected}, expected)
    assert found.keys() == expected.keys()


def test_the_pass_without_gradient_sees_the_same_random_draws():
    """Else the coefficients would belong to other predictions: dropout, LayerDrop and masks are on."""
    model = tiny_model(tiny_config(hidden_dropout=0.3, final_dropout=0.3, layerdrop=0.4))
    optimizer = make_optimizer(model, rate=0.0, head_rate=0.0, weight_decay=0.0, beta2=0.999)
    seen = []
    model.register_forward_hook(lambda _, __, outputs: seen.append(outputs.dimensions.detach().clone()))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    batches = [collate(examples()[:4]), collate(examples()[4:])]
    run_update(model, model, optimizer, batches, OBJECTIVE, World(), scaler=scaler, seed=3, epoch=1, step=7)
    first, second, again_first, again_second = seen
    assert torch.equal(first, again_first) and torch.equal(second, again_second)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("kind", "label"), [("emotion", 4), ("emotion", -1), ("speaker", 3), ("speaker", -99)])
def test_a_label_that_is_no_class_is_refused_before_any_forward_pass(kind, label):
    """F2: a GPU would end the process with an assertion of its own, far from here."""
    model = tiny_model(tiny_config())
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model was called"))
    optimizer = make_optimizer(model, rate=0.0, head_rate=0.0, weight_decay=0.0, beta2=0.999)
    pool = examples()
    pool[5] = replace(pool[5], labels=pool[5].labels | {kind: label})
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    with pytest.raises(ConfigError, match=rf"utterance 5 .*{kind} {label}\b"):
        run_update(model, model, optimizer, [collate(pool)], OBJECTIVE, World(), scaler=scaler)


def test_with_alpha_0_the_text_adds_exactly_nothing():
    """Not even where the CTC loss is infinite."""
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    found = []
    for pool in (examples(), examples(without=("ctc",))):
        model = tiny_model(tiny_config())
        with torch.no_grad():
            model.lm_head.bias[1:] = -torch.inf  # every transcript is impossible
        model.lm_head.requires_grad_(False)
        optimizer = make_optimizer(model, rate=0.0, head_rate=0.0, weight_decay=0.0, beta2=0.999)
        objective = Objective(weights={"emotion": 1.0, "ctc": 0.0, "speaker": 0.0, "dimensions": 0.0})
        run_update(model, model, optimizer, [collate(pool)], objective, World(), scaler=scaler)
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])
    assert all(torch.isfinite(g).all() for g in found[0].values())


def test_gradients_are_clipped_after_they_are_unscaled():
    norms = []
    for enabled in (False, True):
        model = tiny_model(tiny_config(), dtype=torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        scaler = torch.amp.GradScaler("cpu", enabled=enabled, init_scale=1024.0)
        run_update(
            model,
            model,
            optimizer,
            [collate(examples(dtype=torch.float32))],
            Objective(weights={"emotion": 1.0, "ctc": 0.1, "speaker": 0.3}),
            World(),
            scaler=scaler,
            clip=0.05,
        )
        after = torch.cat([p.detach().flatten() for p in model.parameters()])
        norms.append(float((after - before).norm()))
    assert norms[0] == pytest.approx(0.05, rel=1e-4)
    assert norms[1] == pytest.approx(0.05, rel=1e-3)


def test_an_update_whose_gradient_is_not_finite_changes_nothing():
    model = tiny_model(tiny_config())
    optimizer = make_optimizer(model, rate=1e-2, head_rate=0.0, weight_decay=0.1, beta2=0.999)
    set_rate(optimizer, 1.0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    bad = examples()
    bad[3].waveform[100] = torch.inf
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    result = run_update(model, model, optimizer, [collate(bad)], OBJECTIVE, World(), scaler=scaler)
    assert result.skipped
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_fp16_overflow_halves_the_scale_and_changes_nothing():
    model = tiny_model(tiny_config(), dtype=torch.float32)
    optimizer = make_optimizer(model, rate=1e-2, head_rate=0.0, weight_decay=0.1, beta2=0.999)
    set_rate(optimizer, 1.0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    scaler = torch.amp.GradScaler("cpu", enabled=True, init_scale=2.0**126)
    objective = Objective(weights={"emotion": 1e6, "ctc": 0.1, "speaker": 0.3})
    run_update(
        model, model, optimizer, [collate(examples(dtype=torch.float32))], objective, World(), scaler=scaler
    )
    assert scaler.get_scale() == 2.0**125
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_bf16_autocast_gives_nearly_the_float32_gradient():
    found = {}
    for amp in ("off", "bf16"):
        model = tiny_model(tiny_config(), dtype=torch.float32)
        optimizer = make_optimizer(model, rate=0.0, head_rate=0.0, weight_decay=0.0, beta2=0.999)
        run_update(
            model,
            model,
            optimizer,
            [collate(examples(dtype=torch.float32))],
            Objective(weights={"emotion": 1.0, "ctc": 0.1, "speaker": 0.3, "dimensions": 1.0}),
            World(),
            scaler=torch.amp.GradScaler("cpu", enabled=False),
            amp=amp,
        )
        found[amp] = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert 0 < (found["off"] - found["bf16"]).norm() < 0.1 * found["off"].norm()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's malloc")
def test_training_has_the_memory_that_tensors_gave_back_without_new_page_faults():
    """In a process of its own, as the setting is one of the whole process; at the end it is given back."""
    program = """
import resource, torch
import ser.train.loop  # what a training process has imported
from ser.device import freed_memory_kept
torch.set_num_threads(1)
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
size = 64 << 20
def of_uses(count):
    before = faults()
    for _ in range(count):
        torch.empty(size, dtype=torch.uint8).fill_(1)
    return faults() - before
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
with freed_memory_kept(torch.device("cpu")):
    of_uses(4)
    inside, before = of_uses(4), resident()
print(inside, (before - resident()) / size)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    inside, given_back = map(float, done.stdout.split())
    assert inside < 0.01 * 4 * (64 << 20) / resource.getpagesize()
    assert given_back > 0.9
