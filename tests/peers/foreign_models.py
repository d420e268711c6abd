"""Models that are published with their own code, written as that code writes them."""

import torch
import transformers
from torch import nn


class RegressionHead(nn.Module):
    """As the model card of audeering/wav2vec2-large-robust-12-ft-emotion-msp-dim writes it."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.final_dropout)
        self.out_proj = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, features):
        x = self.dropout(features)
        x = torch.tanh(self.dense(x))
        return self.out_proj(self.dropout(x))


class EmotionModel(transformers.Wav2Vec2PreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.wav2vec2 = transformers.Wav2Vec2Model(config)
        self.classifier = RegressionHead(config)
        self.post_init()

    def forward(self, input_values):
        return self.classifier(self.wav2vec2(input_values)[0].mean(dim=1))


def speech_classification(model_type):
    """ForSpeechClassification of the widespread notebook (m3hrdadfi/soxan), for one of the architectures."""
    prefix = {"wav2vec2": "Wav2Vec2", "hubert": "Hubert", "wavlm": "WavLM", "data2vec-audio": "Data2VecAudio"}[
        model_type
    ]
    base = getattr(transformers, f"{prefix}PreTrainedModel")

    class ForSpeechClassification(base):
        def __init__(self, config):
            super().__init__(config)
            setattr(self, self.base_model_prefix, getattr(transformers, f"{prefix}Model")(config))
            self.classifier = RegressionHead(config)  # the same layers
            self.post_init()

        def forward(self, input_values):
            hidden = getattr(self, self.base_model_prefix)(input_values)[0]
            pooled = {"mean": hidden.mean(1), "sum": hidden.sum(1), "max": hidden.max(1)[0]}
            return self.classifier(pooled[self.config.pooling_mode])

    return ForSpeechClassification


class Wav2Vec2ForCTCnCLS(transformers.Wav2Vec2PreTrainedModel):
    """The layers of the code of Cai et al. (2021), and the speaker head that followers add."""

    def __init__(self, config, classes=4, speakers=10):
        super().__init__(config)
        self.wav2vec2 = transformers.Wav2Vec2Model(config)
        self.dropout = nn.Dropout(config.final_dropout)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.cls_head = nn.Linear(config.hidden_size, classes)
        self.spk_head = nn.Linear(config.hidden_size, speakers)
        self.post_init()

    def forward(self, input_values):
        hidden = self.dropout(self.wav2vec2(input_values)[0])
        pooled = hidden.mean(dim=1)
        return self.lm_head(hidden), self.cls_head(pooled), self.spk_head(pooled)
