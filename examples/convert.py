"""Turn a checkpoint of another library into a model folder, and compare each layer with that library.

    python examples/convert.py downloads/wav2vec2-base models/wav2vec2-base
    python examples/convert.py wav2vec2_fairseq_base_ls960.pth models/wav2vec2-base

This is `ser convert`, whose help says more, with one check in addition. The reference computes with the source's
tensors, and each layer's output has to be equal to ours within rounding, or nothing is written. The reference is
torchaudio for its own checkpoints, and transformers for all others. It is used where it is installed.
"""

import sys
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from ser.cli import call
from ser.convert.convert import Source, encoder_tensors
from ser.errors import ModelFolderError, summary
from ser.models.config import NEUTRAL_VALUES, Wav2Vec2Config


@torch.no_grad()
def layers_of_transformers(source: Source, config: Wav2Vec2Config, waveform: Tensor) -> tuple[str, list[Tensor]]:
    """Compute the layers of transformers' model with the source's tensors; ImportError without transformers."""
    import transformers

    # Use the values of the file and not our configuration, so that defaults are those of transformers.
    known = {f.name for f in fields(Wav2Vec2Config)} | NEUTRAL_VALUES.keys()
    values = {key: v for key, v in source.values.items() if key in known} | {"model_type": config.model_type}
    model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(**values)).float().eval()
    keys = model.load_state_dict(encoder_tensors(source), strict=False)
    problems = set(keys.missing_keys + keys.unexpected_keys) - {"masked_spec_embed"}
    if problems:
        raise ModelFolderError(f"{source.path}: transformers has other tensors: {summary(sorted(problems))}")
    output = model(waveform, output_hidden_states=True)
    # In a pre-norm encoder, its last hidden state has the final norm, as ours; the last of its layers has not.
    return f"transformers {transformers.__version__}", [*output.hidden_states[:-1], output.last_hidden_state]


@torch.no_grad()
def layers_of_torchaudio(source: Source, config: Wav2Vec2Config, waveform: Tensor) -> tuple[str, list[Tensor]]:
    """Compute the layers of torchaudio's model with the source's tensors; ImportError without torchaudio."""
    import torchaudio
    from torchaudio.models import wav2vec2_model, wavlm_model

    convolutions = zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True)
    options: dict[str, Any] = {
        "extractor_mode": f"{config.feat_extract_norm}_norm",
        "extractor_conv_layer_config": list(convolutions),
        "extractor_conv_bias": config.conv_bias,
        "encoder_embed_dim": config.hidden_size,
        "encoder_pos_conv_kernel": config.num_conv_pos_embeddings,
        "encoder_pos_conv_groups": config.num_conv_pos_embedding_groups,
        "encoder_num_layers": config.num_hidden_layers,
        "encoder_num_heads": config.num_attention_heads,
        "encoder_ff_interm_features": config.intermediate_size,
        "encoder_layer_norm_first": config.do_stable_layer_norm,
        "aux_num_out": None,
    }
    for dropout in ("projection_dropout", "attention_dropout", "ff_interm_dropout", "dropout", "layer_drop"):
        options[f"encoder_{dropout}"] = 0.0
    if config.model_type == "wavlm":
        options |= {"encoder_num_buckets": config.num_buckets, "encoder_max_distance": config.max_bucket_distance}
    model = (wavlm_model if config.model_type == "wavlm" else wav2vec2_model)(**options)
    own = {k: t.float() for k, t in source.original.items() if k.startswith(("encoder.", "feature_extractor."))}
    model.eval().load_state_dict(own)
    hidden, _ = model(waveform)
    # It does not return the input of the first layer. The last layer with its norm is only returned as the result.
    layers, _ = model.extract_features(waveform)
    return f"torchaudio {torchaudio.__version__}", [*layers[:-1], hidden]


def reference_layers(source: Source, config: Wav2Vec2Config, waveform: Tensor) -> tuple[str, list[Tensor]]:
    """Return the reference's name and version, and its layers, for any kind of source."""
    layers_of = layers_of_torchaudio if source.kind == "torchaudio" else layers_of_transformers
    return layers_of(source, config, waveform)


if __name__ == "__main__":
    sys.exit(call("convert", sys.argv[1:], text=__doc__, reference=reference_layers))
