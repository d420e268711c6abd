"""``torch.export`` of encoder and heads: one recorded graph serves every batch, as the model itself does."""

from dataclasses import replace

import torch
from compare import NAN, assert_close, sound
from torch.export import Dim

from ser.models.multitask import HeadsConfig, MultiTaskModel

HEADS = HeadsConfig(num_emotions=4, vocab_size=9, num_speakers=3, num_dimensions=3, pooling="mean+std")
BATCH, SAMPLES = Dim("batch", min=1, max=64), Dim("samples", min=800, max=30 * 16_000)


def batch_of(*lengths, size=None):
    batch = torch.full((len(lengths), size or max(lengths)), NAN)
    for row, length in enumerate(lengths):
        batch[row, :length] = sound(length, seed=row)
    return batch, torch.tensor(lengths)


def recorded(model):
    """The model's graph, recorded with a padded batch of two.

    How many frames there are follows from the samples by divisions that the exporter does not see through, so what
    it would guard is asserted when the graph runs.
    """
    batch, num_samples = batch_of(16_000, 9000)
    program = torch.export.export(
        model,
        (batch.nan_to_num(0.0), num_samples),
        dynamic_shapes={"waveforms": {0: BATCH, 1: SAMPLES}, "num_samples": {0: BATCH}},
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    return program.module()


BATCHES = {
    "one": batch_of(5000),
    "one-shortest": batch_of(800),
    "one-longest": batch_of(30 * 16_000),
    "one-padded": batch_of(5000, size=8000),
    "unpadded": batch_of(4000, 4000, 4000),
    "padded": batch_of(7000, 400, 3000, 6999),
    "most": batch_of(*(800 + 10 * row for row in range(64))),
}


def assert_a_graph_serves(model):
    graph = recorded(model)
    for name, (batch, num_samples) in BATCHES.items():
        with torch.no_grad():
            expected, found = model(batch, num_samples), graph(batch, num_samples)
        assert torch.equal(found.num_frames, expected.num_frames), name
        for head in model.heads:
            wanted, given = getattr(expected, head), getattr(found, head)
            if head == "ctc":  # what stands after the valid frames has no meaning
                wanted, given = (
                    torch.cat([row[:n] for row, n in zip(scores, found.num_frames.tolist(), strict=True)])
                    for scores in (wanted, given)
                )
            assert_close(given, wanted)


def test_a_recorded_graph_gives_what_the_model_gives_for_any_batch(config, randomise):
    """Of every architecture; a batch of one, unpadded and padded ones, the shortest, longest and largest."""
    assert_a_graph_serves(randomise(MultiTaskModel(replace(config, num_hidden_layers=2), HEADS)).eval())


def test_heads_that_read_all_layers_can_be_recorded_too(styles, randomise):
    heads = HeadsConfig(num_emotions=4, layers="weighted", pooling="attentive", projection=8)
    config = replace(styles["small-style"], num_hidden_layers=1)
    assert_a_graph_serves(randomise(MultiTaskModel(config, heads)).eval())
