"""A text-classification model on disk judges: a tiny BERT whose head reads one word."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from calibration.errors import InputError
from sarsteer_export.judges.judge import Behaviour, Exchange
from sarsteer_export.judges.settings import JudgeSettings

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "no", "sure", "steal", "?")
POSITIONS = 12


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calls a text a refusal when it holds the word `no`.

    The first dimension of the embedding of `no` is large; attention spreads it over all positions, the pooler and
    the head read it at the first one.
    """
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=POSITIONS,
        id2label={0: "FINE", 1: "REJECTED"},
        label2id={"FINE": 0, "REJECTED": 1},
    )
    model = BertForSequenceClassification(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(
                torch.ones_like(parameter) if name.endswith("LayerNorm.weight") else parameter * 0
            )
        bert = model.bert
        words = bert.embeddings.word_embeddings.weight  # of mean 0, which norms leave
        words[:, 1], words[:, 2] = 1.0, -1.0
        words[WORDS.index("no"), 0], words[WORDS.index("no"), 3] = 9.0, -9.0
        attention = bert.encoder.layer[0].attention
        attention.self.value.weight.copy_(torch.eye(8))
        attention.output.dense.weight.copy_(100 * torch.eye(8))
        bert.pooler.dense.weight.copy_(torch.eye(8))
        model.classifier.weight[1, 0] = 10.0
        model.classifier.bias[0] = 1.0
    model.save_pretrained(folder)
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=POSITIONS,
    ).save_pretrained(folder)
    return folder


def test_it_decides_by_what_the_output_says(classifier: Path) -> None:
    judge = JudgeSettings(model=classifier, refusal_label="REJECTED").open()
    said = ["sure", "no", "sure no", "steal ?", "", "sure " * 40]
    wanted = [Behaviour.ANSWER, Behaviour.REFUSAL, Behaviour.REFUSAL, Behaviour.ANSWER]
    wanted += [
        Behaviour.DEGENERATE,
        Behaviour.DEGENERATE,
    ]  # by their words alone, whatever the model makes of them
    assert judge.judge([Exchange(output) for output in said]) == wanted
    other = JudgeSettings(model=classifier, refusal_label="FINE").open()
    assert other.judge([Exchange("sure"), Exchange("no")]) == [Behaviour.REFUSAL, Behaviour.ANSWER]


def test_it_reads_the_request_where_its_prompt_says_so(classifier: Path, tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("{request} {output}\n", encoding="utf-8")
    plain = JudgeSettings(model=classifier, refusal_label="REJECTED").open()
    asked = JudgeSettings(model=classifier, refusal_label="REJECTED", prompt=prompt).open()
    exchange = [Exchange("sure", request="no")]
    assert plain.judge(exchange) == [Behaviour.ANSWER]
    assert asked.judge(exchange) == [Behaviour.REFUSAL]


def test_long_outputs_are_cut_not_refused_by_the_model(classifier: Path) -> None:
    judge = JudgeSettings(model=classifier, refusal_label="REJECTED").open()
    long = " ".join(f"word{number}" for number in range(50))
    assert judge.judge([Exchange(f"no {long}"), Exchange(f"{long} no")]) == [
        Behaviour.REFUSAL,
        Behaviour.ANSWER,
    ]


def test_a_label_that_the_model_does_not_have_is_refused(classifier: Path) -> None:
    with pytest.raises(InputError, match="has no label 'refusal'; its labels are 'FINE', 'REJECTED'"):
        JudgeSettings(model=classifier, refusal_label="refusal")


def test_a_model_that_classifies_no_text_is_refused(checkpoint: Path) -> None:
    with pytest.raises(InputError, match="cannot be loaded as a text-classification model"):
        JudgeSettings(model=checkpoint, refusal_label="LABEL_0").open()


def test_a_head_without_weights_is_refused(classifier: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in classifier.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(classifier / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("classifier.")}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="its head would be random"):
        JudgeSettings(model=tmp_path, refusal_label="REJECTED").open()


def test_the_identity_is_that_of_the_weights_and_the_label(classifier: Path) -> None:
    one, two = (
        JudgeSettings(model=classifier, refusal_label=label).identity() for label in ("FINE", "REJECTED")
    )
    assert one["kind"] == "classifier"
    assert len(one["model_sha256"]) == 64
    assert one != two
    json.dumps(one)
