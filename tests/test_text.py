"""The tokenizer beside transformers', filled gaps beside transformers' logits, and the `fill-mask` command."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import opsin
from opsin import checkpoints
from opsin.checkpoints import Checkpoint, Source
from opsin.cli import main
from opsin.errors import CheckpointError, NoMask, TextError, TextTooLong
from opsin.models.layers import Trace
from opsin.models.perceiver_io import TextPerceiver, TextPerceiverConfig
from opsin.text import (
    CLS,
    MASK,
    NUM_SPECIAL,
    SEP,
    SPECIAL_TOKENS,
    VOCAB_SIZE,
    TextModel,
    detokenize,
    show_byte,
    tokenize,
)

TEXTS = [
    "",
    "This is an incomplete sentence where some words are [MASK].",
    "[MASK][MASK]",
    " [MASK]  [MASK] ",
    "a[SEP]b [PAD] [CLS][BOS]\r\n[EOS]",
    "héé 中文 😀[MASK]👩‍👩‍👧",
    "这是一个[MASK][MASK][MASK]句子。",
    "[MASK [mask] [[MASK]] MASK]",
    "a\x00b\x7f\ufeff\u202e",
    "  lead, trail\t\n  ",
    "e\u0301 and \u00e9",
]
CONFIG = TextPerceiverConfig(
    num_latents=5,
    latent_dim=12,
    layers_per_block=2,
    num_heads=2,
    num_cross_heads=2,
    qk_dim=6,
    v_dim=14,
    embed_dim=10,
    max_length=64,
    numerics="transformers",
)


@torch.no_grad()
def noise(model: nn.Module, *embeddings: Tensor) -> None:
    """In every parameter, enough that each place gets other logits; less in the embeddings, which multiply those."""
    for parameter in model.parameters():
        parameter.normal_()
    for table in embeddings:
        table *= 0.05


def noisy(config: TextPerceiverConfig) -> TextPerceiver:
    torch.manual_seed(0)
    model = TextPerceiver(config)
    noise(model, model.front_end.embed.weight, model.front_end.positions.table)
    return model.eval()


def text_model(model: nn.Module) -> TextModel:
    return TextModel(Checkpoint(model, None, None, Source("test/noise", None, "", "opsin")))


@pytest.fixture(scope="module")
def filler() -> TextModel:
    return text_model(noisy(CONFIG))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import PerceiverTokenizer

    return PerceiverTokenizer()


class Wanted(TextPerceiver):
    """Gives, in order, the bytes wanted of the masks, whatever stands around them."""

    def __init__(self, wanted: bytes, config: TextPerceiverConfig = CONFIG) -> None:
        super().__init__(config)
        self.wanted = wanted

    def forward(self, ids: Tensor, mask: Tensor | None = None, trace: Trace | None = None) -> Tensor:
        logits = torch.zeros(*ids.shape, VOCAB_SIZE)
        logits[..., MASK] = 9  # likelier than any byte, and not what a gap is filled with
        for row in range(len(ids)):
            for byte, place in zip(self.wanted, (ids[row] == MASK).nonzero()[:, 0], strict=True):
                logits[row, place, NUM_SPECIAL + byte] = 3
        return logits


# ── the tokenizer ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("text", TEXTS)
def test_tokenize_as_transformers(tokenizer: Any, text: str) -> None:
    ids = tokenize(text)
    assert [CLS, *ids, SEP] == tokenizer(text).input_ids
    assert detokenize(ids) == text


@given(st.lists(st.sampled_from(SPECIAL_TOKENS) | st.text(st.characters(codec="utf-8"))).map("".join))
def test_tokenize_as_transformers_any_text(tokenizer: Any, text: str) -> None:
    ids = tokenize(text)
    assert [CLS, *ids, SEP] == tokenizer(text).input_ids
    assert detokenize(ids) == text


@given(st.lists(st.integers(0, VOCAB_SIZE - 1)), st.booleans())
def test_detokenize_as_transformers_any_ids(tokenizer: Any, ids: list[int], special: bool) -> None:
    assert detokenize(ids, special=special) == tokenizer.decode(ids, skip_special_tokens=not special)


def test_bytes_that_are_no_text() -> None:
    assert detokenize([NUM_SPECIAL + 0xE4, NUM_SPECIAL + ord("A"), MASK]) == "\ufffdA[MASK]"
    with pytest.raises(ValueError, match="no token 262: ids are 0 to 261"):
        detokenize([262])
    with pytest.raises(TextError, match=r"'\\ud800', half of a character"):
        tokenize("ok \ud800")


# ── filling gaps ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_gaps_are_filled_with_the_best_bytes() -> None:
    result = text_model(Wanted(b" cat\xe4\xb8\xad")).fill_mask("A[MASK:4] says [MASK][MASK][MASK].", top_k=2)
    assert result["text"] == "A[MASK:4] says [MASK][MASK][MASK]."
    assert result["filled"] == "A cat says 中."
    assert [gap["text"] for gap in result["gaps"]] == [" cat", "中"]
    assert [[len(choices) for choices in gap["bytes"]] for gap in result["gaps"]] == [[2] * 4, [2] * 3]
    best, second = result["gaps"][0]["bytes"][1]
    assert (best["byte"], best["token"]) == (ord("c"), "c")
    assert (second["byte"], second["token"]) == (0, "<0x00>")  # of equal ones the lower
    e = torch.e
    assert best["score"] == pytest.approx(e**3 / (e**3 + e**9 + VOCAB_SIZE - 2))


def test_bytes_that_are_no_character_are_shown_as_such() -> None:
    result = text_model(Wanted(b"\xe4\xb8")).fill_mask("一[MASK]二[MASK]")
    assert result["filled"] == "一\ufffd二\ufffd"
    assert [show_byte(byte) for byte in (0x20, 0x7E, 0x7F, 0xE4)] == [" ", "~", "<0x7F>", "<0xE4>"]


def test_other_special_tokens_stay() -> None:
    assert text_model(Wanted(b"x")).fill_mask("a[SEP]b[MASK]")["filled"] == "a[SEP]bx"


@pytest.mark.parametrize("numerics", ["transformers", "deepmind"])
def test_what_the_model_is_given(numerics: Any, filler: TextModel) -> None:
    """CLS and SEP for a file of transformers, nothing for one of DeepMind."""
    model = text_model(noisy(replace(CONFIG, numerics=numerics)))
    around = ([CLS], [SEP]) if numerics == "transformers" else ([], [])
    ids = [*around[0], *tokenize("ab [MASK]c"), *around[1]]
    place = ids.index(MASK)
    scores = model.model(torch.tensor([ids]))[0, place].softmax(0)[NUM_SPECIAL:]
    (gap,) = model.fill_mask("ab [MASK]c", top_k=256)["gaps"]
    (choices,) = gap["bytes"]
    assert sorted(choice["byte"] for choice in choices) == list(range(256))
    for choice in choices:
        assert choice["score"] == pytest.approx(scores[choice["byte"]].item(), rel=1e-5)
    assert choices == sorted(choices, key=lambda choice: -choice["score"])
    assert model.max_length == 64 - sum(map(len, around))


@pytest.mark.parametrize("numerics", ["transformers", "deepmind"])
def test_a_list_gives_what_each_gives_alone(numerics: Any) -> None:
    model = text_model(noisy(replace(CONFIG, numerics=numerics)))
    texts = ["[MASK]", *(f"{'word ' * (i % 7)}[MASK:{i % 5 + 1}] 中" for i in range(9))]  # more than one batch
    together = model.fill_mask(texts, top_k=3)
    assert len(together) == len(texts)
    for text, result in zip(texts, together, strict=True):
        alone = model.fill_mask(text, top_k=3)
        assert (result["text"], result["filled"]) == (text, alone["filled"])
        for gap, gap_alone in zip(result["gaps"], alone["gaps"], strict=True):
            assert gap["text"] == gap_alone["text"]
            for choices, choices_alone in zip(gap["bytes"], gap_alone["bytes"], strict=True):
                assert [c["byte"] for c in choices] == [c["byte"] for c in choices_alone]
                assert [c["score"] for c in choices] == pytest.approx([c["score"] for c in choices_alone], rel=1e-4)
    assert model.fill_mask(()) == []


def test_as_transformers_padded_to_the_full_length(tokenizer: Any, tmp_path: Path) -> None:
    """The documented way pads to `max_position_embeddings` and masks that; opsin runs at the text's own length."""
    from transformers import PerceiverConfig, PerceiverForMaskedLM

    torch.manual_seed(0)
    config = PerceiverConfig(
        num_latents=5, d_latents=16, d_model=24, num_blocks=1, num_self_attends_per_block=2, qk_channels=8,
        v_channels=16, num_self_attention_heads=4, num_cross_attention_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    reference = PerceiverForMaskedLM(config).eval()
    front_end = reference.perceiver.input_preprocessor
    noise(reference, front_end.embeddings.weight, front_end.position_embeddings.weight)
    reference.save_pretrained(tmp_path)
    model = opsin.load(tmp_path)
    assert isinstance(model, TextModel)
    for text in ("中 some words[MASK][MASK][MASK].", "x[MASK]"):
        inputs = tokenizer(text, padding="max_length", max_length=64, return_tensors="pt")
        with torch.no_grad():
            expected = reference(inputs=inputs.input_ids, attention_mask=inputs.attention_mask).logits[0]
        length = int(inputs.attention_mask.sum())
        (logits,) = model.logits([inputs.input_ids[0, :length].tolist()])
        # different lengths go through different kernels
        torch.testing.assert_close(logits, expected[:length], atol=1e-5 * expected.abs().max().item(), rtol=0)
        at_masks = expected[inputs.input_ids[0] == MASK][:, NUM_SPECIAL:]
        (gap,) = model.fill_mask(text)["gaps"]
        assert [choices[0]["byte"] for choices in gap["bytes"]] == at_masks.argmax(dim=1).tolist()


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("no gap", NoMask, r"'no gap' has no \[MASK\]\. Put one in place of each missing byte, or \[MASK:7\]"),
        ("", NoMask, r"'' has no \[MASK\]"),
        ("[MASK:0]", NoMask, r"has no \[MASK\]"),
        ("中" * 20 + "[MASK]ab", TextTooLong, r"has 63 bytes and special tokens; this model takes up to 62"),
        ("[MASK:9999]", TextTooLong, r"… has 9999 bytes and special tokens"),
        ("[MASK] \udcff", TextError, "half of a character"),
    ],
)
def test_texts_that_are_refused(filler: TextModel, text: str, kind: type[TextError], message: str) -> None:
    with pytest.raises(kind, match=message):
        filler.fill_mask(text)
    with pytest.raises(ValueError, match=message):
        filler.fill_mask(["[MASK]", text])


def test_the_longest_text(filler: TextModel) -> None:
    result = filler.fill_mask("a" * 61 + "[MASK]")
    assert result["filled"].startswith("a" * 61)


@pytest.mark.parametrize(
    ("text", "message"), [(b"[MASK]", "text is bytes"), (None, "text is NoneType"), (["[MASK]", 3], "a list with int")]
)
def test_what_is_no_text(filler: TextModel, text: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        filler.fill_mask(text)


@pytest.mark.parametrize("top_k", [0, 257])
def test_top_k_out_of_range(filler: TextModel, top_k: int) -> None:
    with pytest.raises(ValueError, match=f"top_k is {top_k}; there are 256 bytes"):
        filler.fill_mask("[MASK]", top_k=top_k)


def test_models_that_cannot_fill_gaps(noisy_checkpoint: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match="test/noise is no model of text"):
        TextModel(noisy_checkpoint)
    with pytest.raises(CheckpointError, match="has 7 tokens; text of bytes has 262"):
        text_model(TextPerceiver(replace(CONFIG, vocab_size=7)))
    broken = noisy(CONFIG)
    with torch.no_grad():
        broken.bias[:] = torch.nan
    with pytest.raises(CheckpointError, match="not finite"):
        text_model(broken).fill_mask("[MASK]")


def test_a_loaded_model_says_what_it_is(filler: TextModel) -> None:
    assert repr(filler).startswith("<opsin test/noise: 0.0M parameters, 62 bytes of text>")


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "model"
    checkpoints.write(path, noisy(CONFIG), None, None)
    return path


def command(*arguments: object, stdin: bytes | None = None) -> Result:
    result = CliRunner().invoke(main, [str(a) for a in arguments], input=stdin)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_a_pipe_gets_a_json_line(folder: Path, filler: TextModel) -> None:
    result = command("fill-mask", "中 [MASK:3].", "--model", folder, "--top-k", 2)
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    assert record.pop("ok")
    assert record == filler.fill_mask("中 [MASK:3].", top_k=2)


def test_texts_on_standard_input(folder: Path) -> None:
    lines = b"a [MASK]\r\n\nno gap\n\xff [MASK]\n" + b"x" * 99 + b"[MASK]\nb[MASK]"
    result = command("fill-mask", "-", "--model", folder, stdin=lines)
    assert result.exit_code == 3
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["text"][0] for row in rows] == ["a", "n", "\udcff", "x", "b"]
    assert [row["ok"] for row in rows] == [True, False, False, False, True]
    assert [row["error"]["type"] for row in rows[1:4]] == ["no_mask", "text", "too_long"]
    assert "Give the part around the gap" in rows[3]["error"]["message"]


def test_a_terminal_gets_lines(folder: Path, filler: TextModel, on_a_terminal: Callable[..., str]) -> None:
    seen = on_a_terminal("fill-mask", "some [MASK:2]", "--model", str(folder), "--top-k", "3")
    (gap,) = filler.fill_mask("some [MASK:2]", top_k=3)["gaps"]
    for choices in gap["bytes"]:
        assert "  ".join(f"{best['token']} {best['score']:.1%}" for best in choices) in seen
    assert "no_mask: 'hello' has no [MASK]" in on_a_terminal("fill-mask", "hello", "--model", str(folder))


def test_a_model_of_another_task(folder: Path, photos: Path) -> None:
    result = command("fill-mask", "a [MASK]", "--model", "opsin/vit-tiny")
    assert result.exit_code == 4
    assert (
        result.stderr
        == "opsin: opsin/vit-tiny classifies images; `opsin classify`, `opsin embed`, `opsin explain` can use it.\n"
    )
    result = command("classify", photos, "--model", folder)
    assert result.exit_code == 4
    assert f"{folder} fills gaps in text; `opsin fill-mask`, `opsin explain` can use it." in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing argument 'TEXT'"),
        (["[MASK]", "--top-k", "257"], "257 is not in the range"),
        (["[MASK]", "--device", "quantum"], 'device "quantum" cannot be used'),
    ],
)
def test_usage_errors(arguments: list[str], message: str) -> None:
    result = command("fill-mask", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    result = command("fill-mask", "[MASK]", "--model", tmp_path)
    assert result.exit_code == 4
    assert "has no config.json" in result.stderr
