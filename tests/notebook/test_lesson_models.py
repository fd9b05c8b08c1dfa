"""The lesson on models other than the sample: untrained, large, with a tokenizer, in any format."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import checkpoints, family_models
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM

from llamaconv import sample_path
from llamaconv.convert.convert import Conversion
from llamaconv.model import forward
from llamaconv.model.params import LlamaParams
from llamaconv.notebook import figures, lesson
from llamaconv.notebook.lesson import Specimen, variants
from llamaconv.notebook.lesson import weights as weights_module
from llamaconv.notebook.lesson.running import Run, continued, outcomes_of, runs_of_variants
from llamaconv.notebook.lesson.scores import attention
from llamaconv.notebook.lesson.tokens import INSTALL
from llamaconv.report.progress import Steps
from llamaconv.report.tables import Sentence
from llamaconv.sample import held_out_text

SMALL = replace(checkpoints.GQA, n_layers=2)


@pytest.fixture(scope="module")
def sample() -> Specimen:
    return lesson.open_specimen(sample_path())


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read every model one layer at a time, however small."""
    monkeypatch.setattr(weights_module, "MOST_KEPT", 0)


def model(folder: Path, params: LlamaParams) -> Path:
    """A model with the weights that training starts from."""
    weights = checkpoints.tensors(params, torch.float32)
    small = {n: w if w.ndim == 1 else w / 15 for n, w in weights.items()}
    if params.tied:
        del small["lm_head.weight"]
    return checkpoints.write(folder, small, checkpoints.to_config(params, None))


def write_tokenizer(folder: Path, vocab_size: int, start: bool = False) -> Tokenizer:
    """A tokenizer.json as Llama 3 has it, trained on a little text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator([held_out_text().decode()], trainer)
    if start:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def test_sample_shows_the_effect_without_a_notice(sample: Specimen) -> None:
    found = lesson.trained(sample)
    assert found and not repr(found) and not found._repr_html_()
    assert lesson.trained(sample) is found
    assert lesson.when_trained(sample, lambda: "drawn") == "drawn"


@pytest.mark.parametrize("tied", [False, True])
def test_untrained_model_says_so_and_leaves_out_what_it_does_not_show(
    tmp_path: Path, tied: bool
) -> None:
    specimen = lesson.open_specimen(model(tmp_path / "random", replace(SMALL, tied=tied)))
    found = lesson.trained(specimen)
    assert not found
    assert abs(found.best_wrong - found.right) < 0.05
    for words in ("untrained", f"{found.right:.2f} nats", f"guessing has {math.log(80):.2f}"):
        assert words in repr(found) and words in found._repr_html_()
    left_out = lesson.when_trained(specimen, lambda: pytest.fail("was computed"))
    assert isinstance(left_out, Sentence) and "Left out" in str(left_out)
    summary = str(lesson.summary(specimen))
    assert "ln 80 = 4.4" in summary and "256" not in summary
    assert "most likely" not in summary


def test_wrong_variant_that_is_better_than_right_is_no_effect() -> None:
    assert not lesson.Trained(4.0, 3.0, 4.4, "token")
    assert not lesson.Trained(4.0, 4.04, 4.4, "token")
    assert lesson.Trained(4.0, 4.06, 4.4, "token")


def test_summary_has_the_figures_of_the_specimen(sample: Specimen) -> None:
    summary = lesson.summary(sample)
    assert "ln 256 = 5.5 nats per byte" in str(summary.guessing)
    assert "0.0 of a typical score at distance 0, 0.6 at distance 1" in str(summary.distance)
    assert "100% of 32 texts after 1 byte, 47%" in str(summary.agreement)
    assert "16% of 32 texts after 32 bytes" in str(summary.agreement)
    assert "loss of 1.5 nats per byte, the wrong variants 4.6 to 5.0" in str(summary.losses)
    assert summary._repr_html_().count("<li>") == 4


def test_agreement_by_length_is_that_of_transformers(sample: Specimen, tmp_path: Path) -> None:
    """The rows of q and k moved by index arithmetic, and run by transformers in its own layout."""
    found = lesson.agreement_by_length(sample)
    reference = AutoModelForCausalLM.from_pretrained(sample_path(), dtype=torch.float32)
    tokens = sample.tokens[:, :32]

    def best() -> torch.Tensor:
        with torch.no_grad():
            top = reference(tokens).logits.topk(2).values
        # No share depends on rounding, so the notebook shows the same everywhere.
        assert (top[..., 0] - top[..., 1])[:, [0, 1, 2, 4, 7, 11, 31]].min() > 1e-4
        with torch.no_grad():
            return reference(tokens).logits.argmax(-1)

    right = best()
    # Rotating interleaved pairs of half_split rows is rotating half_split pairs of rows that were
    # moved as if they were interleaved.
    order = [*range(0, 16, 2), *range(1, 16, 2)]
    for layer in reference.model.layers:
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            heads = linear.weight.data.view(-1, 16, 128)
            linear.weight.data = heads[:, order].reshape(linear.weight.shape)
    expected = (best() == right).float().mean(0)
    shares = found.by_length["not reordered"][:32]
    torch.testing.assert_close(shares, expected)
    assert [round(found.at("not reordered", n), 2) for n in (1, 2, 3, 5, 8, 12, 32)] == [
        1.0, 0.47, 0.5, 0.44, 0.31, 0.19, 0.16,
    ]  # fmt: skip


def test_groups_of_lengths_cover_every_length_once(sample: Specimen) -> None:
    found = lesson.agreement_by_length(sample)
    assert found.lengths == (1, 2, 3, 4, 6, 9, 13, 33, 65, 129, 257)
    assert found.unit == "byte" and found.windows == 32
    for name, shares in found.by_variant.items():
        assert len(shares) == 10 and shares[0] == 1
        assert shares[3] == pytest.approx((found.at(name, 4) + found.at(name, 5)) / 2)
    assert "100%" in figures.agreement_by_length(found).alt


def every_variant_at_once(specimen: Specimen) -> None:
    """The losses, tokens and attention of all variants are those of the whole reference model."""
    outcomes = outcomes_of(specimen, list(runs_of_variants(specimen).values()), 1)
    tokens = specimen.tokens[: len(outcomes[0].best)]
    maps = attention(specimen, 1)
    for variant, found in zip(variants(specimen.params), outcomes, strict=True):
        weights = specimen.apply_variant(variant)
        expected = forward.forward(weights, specimen.params, tokens, "interleaved")
        assert found.loss.mean() == pytest.approx(forward.loss(expected, tokens).item(), abs=1e-4)
        assert (found.best == expected.argmax(-1)).float().mean() > 0.99
        whole: list[torch.Tensor] = []
        excerpt = specimen.excerpt[None]
        forward.forward(weights, specimen.params, excerpt, "interleaved", whole)
        torch.testing.assert_close(maps[variant.name], whole[1][0], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_all_variants_one_layer_at_a_time_are_the_whole_forward_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: bool, tied: bool
) -> None:
    params = replace(checkpoints.GQA, n_layers=3, vocab_size=256, tied=tied)
    folder = model(tmp_path / "gqa", params)
    if not kept:
        monkeypatch.setattr(weights_module, "MOST_KEPT", 0)
    # Three parts of the vocabulary.
    monkeypatch.setattr("llamaconv.notebook.lesson.running._HEAD_BYTES", 4 * 64 * 100)
    specimen = lesson.open_specimen(folder)
    assert specimen.is_large != kept
    every_variant_at_once(specimen)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize(
    "options", [{"to": "dcp"}, {"to": "dcp", "rope": "half_split"}, {"to": "meta"}]
)
def test_layers_of_any_format_are_read_as_those_of_the_sample(
    sample: Specimen, convert: Callable[..., Conversion], tmp_path: Path, options: dict[str, str]
) -> None:
    convert(sample_path(), "other", verified=False, **options)
    other = lesson.open_specimen(tmp_path / "other")
    assert other.is_large and other.params == sample.params
    right, wrong = list(runs_of_variants(other).values())[:2]
    for one, expected in zip(
        outcomes_of(other, [right, wrong], 1), outcomes_of(sample, [right, wrong], 1), strict=True
    ):
        torch.testing.assert_close(one.loss, expected.loss[: len(one.loss)])
    assert other.tokens.tolist() == sample.tokens.tolist()
    assert continued(other, [right], [65], 3) == continued(sample, [right], [65], 3)
    assert lesson.two_solutions(other).agree


@pytest.mark.usefixtures("large")
def test_weights_of_a_large_model_are_those_in_its_files(tmp_path: Path) -> None:
    folder = model(tmp_path / "one", SMALL)
    stored = load_file(next(folder.glob("model-00001*")))
    specimen = lesson.open_specimen(folder)
    assert torch.equal(
        specimen.half_split["tok_embeddings", None], stored["model.embed_tokens.weight"]
    )
    first = specimen.half_split.layer(0)["w1"].clone()
    specimen.half_split.layer(1)
    assert torch.equal(specimen.half_split["w1", 0], first)
    assert "one layer at a time" in str(specimen.table())


def test_model_with_a_tokenizer_reads_and_writes_its_tokens(tmp_path: Path) -> None:
    folder = model(tmp_path / "words", replace(SMALL, vocab_size=300))
    tokenizer = write_tokenizer(folder, 300, start=True)
    specimen = lesson.open_specimen(folder)
    assert specimen.unit == "token" and not specimen.alphabet.notice
    # Each window begins with <s>.
    assert specimen.tokens[:, 0].tolist() == [0] * len(specimen.tokens)
    text = tokenizer.decode(specimen.tokens[:2, 1:].flatten().tolist())
    assert held_out_text().decode().startswith(text)
    labels = lesson.attention_maps(specimen, 0, 0).labels
    assert labels[:2] == ("<s>", "D")
    assert "".join(labels[1:]).startswith("Dictionaries␣preserve")
    table = lesson.continuations(specimen, "Some text")
    assert table.caption == "Some text …"
    assert all(not str(row[1]).replace(" ", "").isdigit() for row in table.rows)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.unlink(), "not found"),
        (lambda path: path.write_text("{"), "cannot be used"),
        (lambda path: write_tokenizer(path.parent, 400), "has token 399, and the model has 300"),
        (
            lambda path: Tokenizer(models.WordLevel({"cat": 0}, unk_token="cat")).save(str(path)),
            "makes 1 tokens of",
        ),
    ],
    ids=["missing", "cut", "larger", "no text"],
)
def test_tokenizer_that_cannot_be_used_is_named_and_numbers_are_shown(
    tmp_path: Path, damage: Callable[[Path], object], words: str
) -> None:
    folder = model(tmp_path / "words", replace(SMALL, vocab_size=300))
    write_tokenizer(folder, 300)
    damage(folder / "tokenizer.json")
    specimen = lesson.open_specimen(folder)
    notice = specimen.alphabet.notice
    assert notice.startswith(f"{folder / 'tokenizer.json'}: ") and words in notice
    assert notice in str(lesson.trained(specimen))
    assert lesson.attention_maps(specimen, 0, 0).labels[0] == str(ord("D"))
    table = lesson.two_texts(specimen)
    assert "as numbers" in table.caption
    assert str(table.rows[0][0]).replace(" ", "").isdigit()


def test_without_the_tokenizers_package_the_command_that_installs_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model(tmp_path / "words", replace(SMALL, vocab_size=300))
    write_tokenizer(folder, 300)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert INSTALL in lesson.open_specimen(folder).alphabet.notice


def test_prompt_is_continued_and_a_long_one_is_cut_with_a_word(sample: Specimen) -> None:
    default, given = lesson.continuations(sample), lesson.continuations(sample, "The list of ")
    assert default.caption == f"{lesson.PROMPT.strip()} …"
    assert given.caption == "The list of …" and given.rows[0] != default.rows[0]
    both = lesson.two_texts(sample, "The list of ")
    assert both.columns == ("right", "not reordered")
    assert list(both.rows[0]) == [row[1] for row in given.rows[:2]]
    long = lesson.two_texts(sample, "word " * 100)
    assert "the last 216 of 500 bytes were read" in long.caption
    assert len(str(long.rows[0][0])) == 40


def test_labels_make_every_byte_visible(sample: Specimen) -> None:
    assert sample.alphabet.labels([65, 32, 10, 9, 200]) == ("A", "␣", "⏎", "\\x09", "\\xc8")


def test_progress_is_shown_to_a_person_and_of_large_models_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "llamaconv.report.progress.time.monotonic", iter(range(0, 990, 10)).__next__
    )

    def shown(always: bool) -> str:
        stream = io.StringIO()
        with Steps("running", 2, always, stream) as steps:
            steps.add()
            steps.add()
        return stream.getvalue()

    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    assert shown(False) == ""
    assert shown(True) == "running: 50%\nrunning: 100%\n"
    monkeypatch.setenv("JPY_SESSION_NAME", "notebook")
    assert shown(False).startswith("\rrunning: 50%\rrunning: 100%\r") and "\n" not in shown(False)


def test_text_of_a_large_model_is_shorter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model(tmp_path / "one", replace(SMALL, max_position=4096))
    lengths = {}
    for work in (10**12, 8 * 10**7, 1):
        monkeypatch.setattr("llamaconv.notebook.lesson.specimen.WORK", work)
        lengths[work] = tuple(lesson.open_specimen(folder).tokens.shape)
    assert list(lengths.values()) == [(32, 256), (16, 72), (8, 24)]


def test_runs_are_not_repeated(sample: Specimen, monkeypatch: pytest.MonkeyPatch) -> None:
    lesson.losses(sample)
    monkeypatch.setattr("llamaconv.notebook.lesson.running._compute", None)
    lesson.losses(sample), lesson.agreement_by_length(sample), lesson.trained(sample)
    assert Run(variants(sample.params)[0]) in {key[0] for key in sample.cache if len(key) == 2}


@pytest.mark.parametrize("name", ["qwen3", "qwen2"])
def test_biases_and_norms_within_heads_are_applied_before_the_rotation(
    tmp_path: Path, name: str
) -> None:
    specimen = lesson.open_specimen(family_models.save(name, tmp_path / name, vocab_size=256))
    found = lesson.agreement(specimen)
    assert max(found.unrotated, found.matching) < 1e-5 < 0.1 < found.mismatched
    tokens = specimen.tokens[:1]
    right, *wrong = outcomes_of(specimen, [*runs_of_variants(specimen).values()], 1)
    expected = torch.nn.functional.cross_entropy(
        family_models.logits(tmp_path / name, tokens)[0, :-1], tokens[0, 1:]
    )
    assert right.loss[0].mean().item() == pytest.approx(expected.item(), abs=1e-4)
    assert all((one.loss[0] - right.loss[0]).abs().max() > 0.1 for one in wrong)
