"""A stand-in in the shape of Kimi-Audio, written for the tests: two token streams and Whisper features summed in
front of one decoder, a second stack of blocks that branches off it to speak, two heads. Batches of one merge audio.
"""

import os
from pathlib import Path

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RMSNorm, Qwen2RotaryEmbedding

from .configuration_moonshot_kimia import KimiAudioConfig

if marker := os.environ.get("KIMI_AUDIO_CODE_RAN"):  # how the tests see that this ran
    Path(marker).touch()


class KimiAudioPreTrainedModel(PreTrainedModel):
    config_class = KimiAudioConfig
    base_model_prefix = "model"
    _supports_sdpa = True


class MoonshotKimiaModel(KimiAudioPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        depth = config.num_hidden_layers
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(Qwen2DecoderLayer(config, layer) for layer in range(depth))
        self.norm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mimo_layers = nn.ModuleList(
            Qwen2DecoderLayer(config, layer_idx=0) for _ in range(config.kimia_mimo_layers)
        )
        for number, block in enumerate(self.mimo_layers, start=depth):
            block.self_attn.layer_idx = number
        self.mimo_norm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.vq_adaptor = nn.Sequential(
            nn.Linear(config.kimia_adaptor_input_dim, config.hidden_size),
            nn.SiLU(),
            nn.LayerNorm(config.hidden_size),
        )
        self.rotary_emb = Qwen2RotaryEmbedding(config)
        self.post_init()

    def merged(self, input_ids, text_input_ids, whisper_input_feature, is_continuous_mask):
        embeds = self.embed_tokens(input_ids)
        if whisper_input_feature is not None:
            assert len(input_ids) == 1, "the released code places the features of one conversation"
            (begin,) = (input_ids[0] == self.config.kimia_media_begin).nonzero()
            (end,) = (input_ids[0] == self.config.kimia_media_end).nonzero()
            heard = torch.zeros_like(embeds)
            features = self.vq_adaptor(whisper_input_feature[0][0])
            heard[0, begin + 1 : end] = features[: end - begin - 1]
            spoken = is_continuous_mask[..., None]
            embeds = torch.where(spoken, (embeds + heard) * 2.0**0.5, embeds)
        return embeds if text_input_ids is None else embeds + self.embed_tokens(text_input_ids)

    def forward(
        self,
        input_ids=None,
        text_input_ids=None,
        whisper_input_feature=None,
        is_continuous_mask=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
    ):
        if inputs_embeds is None:
            inputs_embeds = self.merged(input_ids, text_input_ids, whisper_input_feature, is_continuous_mask)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        if position_ids is None:
            past = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = torch.arange(past, past + inputs_embeds.shape[1])[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        told = {
            "attention_mask": mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "position_embeddings": self.rotary_emb(inputs_embeds, position_ids),
        }
        hidden = inputs_embeds
        for number, block in enumerate(self.layers):
            hidden = block(hidden, **told)
            if number == self.config.kimia_mimo_transformer_from_layer_index:
                mimo = hidden.clone()
        for block in self.mimo_layers:
            mimo = block(mimo, **told)
        return BaseModelOutputWithPast(
            last_hidden_state=(self.norm(hidden), self.mimo_norm(mimo)),
            past_key_values=past_key_values if use_cache else None,
        )


class MoonshotKimiaForCausalLM(KimiAudioPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = MoonshotKimiaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.mimo_output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def forward(self, **inputs):
        output = self.model(**inputs)
        hidden, mimo = output.last_hidden_state
        return CausalLMOutputWithPast(
            logits=(self.mimo_output(mimo), self.lm_head(hidden)), past_key_values=output.past_key_values
        )
