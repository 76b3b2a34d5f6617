"""Configuration of the stand-in for Kimi-Audio: Qwen2's, and where the branch that speaks begins."""

from transformers import Qwen2Config


class KimiAudioConfig(Qwen2Config):
    model_type = "kimi_audio"

    def __init__(
        self,
        kimia_mimo_layers=1,
        kimia_mimo_transformer_from_layer_index=0,
        kimia_token_offset=0,
        kimia_media_begin=0,
        kimia_media_end=0,
        kimia_adaptor_input_dim=16,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.kimia_mimo_layers = kimia_mimo_layers
        self.kimia_mimo_transformer_from_layer_index = kimia_mimo_transformer_from_layer_index
        self.kimia_token_offset = kimia_token_offset
        self.kimia_media_begin = kimia_media_begin
        self.kimia_media_end = kimia_media_end
        self.kimia_adaptor_input_dim = kimia_adaptor_input_dim
