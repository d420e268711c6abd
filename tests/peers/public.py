"""The public encoders that are claimed: what their config.json say, beyond the defaults of their classes."""

from typing import Any

LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
HUGE = {"hidden_size": 1280, "num_hidden_layers": 48, "num_attention_heads": 16, "intermediate_size": 5120}
NORMED = {"feat_extract_norm": "layer", "do_stable_layer_norm": True}  # layer norm everywhere, pre-norm

# name -> (values of config.json). Widths and styles; the numbers of torchaudio.pipelines' bundles agree.
ENCODERS: dict[str, dict[str, Any]] = {
    "wav2vec2-base": {"model_type": "wav2vec2"},
    "wav2vec2-large-960h": {"model_type": "wav2vec2", **LARGE},
    "wav2vec2-large-lv60, -robust, xls-r-300m": {"model_type": "wav2vec2", **LARGE, **NORMED, "conv_bias": True},
    "wav2vec2-xls-r-1b": {"model_type": "wav2vec2", **HUGE, **NORMED, "conv_bias": True},
    "wav2vec2-xls-r-2b": {
        "model_type": "wav2vec2",
        **HUGE,
        **NORMED,
        "conv_bias": True,
        "hidden_size": 1920,
        "intermediate_size": 7680,
    },
    "hubert-base": {"model_type": "hubert"},
    "hubert-large": {"model_type": "hubert", **LARGE, **NORMED, "conv_bias": True},
    "hubert-xlarge": {"model_type": "hubert", **HUGE, **NORMED, "conv_bias": True},
    "hubert without feature norm (distilhubert)": {
        "model_type": "hubert",
        "feat_proj_layer_norm": False,
        "num_hidden_layers": 2,
    },
    "hubert with batch norm": {"model_type": "hubert", "conv_pos_batch_norm": True},
    "wavlm-base, -base-plus": {"model_type": "wavlm"},
    "wavlm-large": {"model_type": "wavlm", **LARGE, **NORMED},
    "data2vec-audio-base": {"model_type": "data2vec-audio"},
    "data2vec-audio-large": {"model_type": "data2vec-audio", **LARGE},
}
