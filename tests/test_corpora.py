"""Real recordings load, and their text is written without loss."""

from pathlib import Path

import pytest
import torch

from ser.audio import audio_info, load_audio
from ser.data.manifest import read_manifest
from ser.data.text import Vocabulary, clean

ROOT = Path(__file__).resolve().parents[1]
CORPORA = ROOT.parent / "shared" / "corpora"
EMODB = CORPORA / "emodb-4class"
LIBRISPEECH = CORPORA / "librispeech-test-other-100"
needs_emodb = pytest.mark.skipif(not EMODB.is_dir(), reason="EmoDB is not at ../shared/corpora")
needs_librispeech = pytest.mark.skipif(not LIBRISPEECH.is_dir(), reason="LibriSpeech is not at ../shared/corpora")


@needs_emodb
def test_every_file_of_emodb_reads_as_its_header_says():
    rows = read_manifest(EMODB / "metadata.csv", columns={"text": "transcript"})
    assert len(rows) == 339 and {row.emotion for row in rows} == {"anger", "happiness", "neutral", "sadness"}
    for row in rows[::10]:
        waveform = load_audio(row.file)
        assert len(waveform) == audio_info(row.file).num_samples
        assert torch.isfinite(waveform).all() and waveform.abs().max() > 0.01


@needs_librispeech
def test_librispeech_s_text_is_written_without_loss_by_its_vocabulary():
    vocabulary = Vocabulary.librispeech()
    rows = read_manifest(LIBRISPEECH / "metadata.csv", columns={"text": "transcript"})
    assert len(rows) == 100
    texts = [clean(row.text) for row in rows]
    assert not vocabulary.unknown_characters(texts)
    for row, text in zip(rows, texts, strict=True):
        spelt = "".join(vocabulary.tokens[i] for i in vocabulary.encode(text)).replace("|", " ")
        assert spelt == row.text
