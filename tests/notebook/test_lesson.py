"""The claims of the lesson, on the sample, and compared with transformers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import checkpoints
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from llamaconv import RefusedError, sample_path
from llamaconv.convert.convert import Conversion
from llamaconv.model import forward, rope
from llamaconv.notebook import lesson
from llamaconv.notebook.lesson import RIGHT, Specimen, variants, wrong_variants
from llamaconv.notebook.lesson.llama_head import HEAD_DIM, THETA
from llamaconv.notebook.lesson.rotation import inverse_frequencies, projected
from llamaconv.notebook.lesson.running import Run, continued
from llamaconv.notebook.lesson.scores import attention
from llamaconv.notebook.lesson.variants import NOT_REORDERED, wrong_kv_heads


def says_in_one_line_what_it_is(value: object) -> bool:
    return len(repr(value).splitlines()) == 1 and len(repr(value)) < 200


@pytest.fixture(scope="module")
def specimen() -> Specimen:
    return lesson.open_specimen(sample_path())


@pytest.fixture(scope="module")
def losses(specimen: Specimen) -> lesson.Losses:
    return lesson.losses(specimen)


@pytest.fixture(scope="module")
def reference() -> AutoModelForCausalLM:
    return AutoModelForCausalLM.from_pretrained(sample_path(), dtype=torch.float32)


def test_the_weights_are_the_checkpoints_own(
    specimen: Specimen, reference: AutoModelForCausalLM
) -> None:
    stored = reference.state_dict()
    assert torch.equal(
        specimen.half_split["wk", 2], stored["model.layers.2.self_attn.k_proj.weight"]
    )
    assert torch.equal(specimen.half_split["output", None], stored["lm_head.weight"])
    assert len(specimen.half_split) == len(stored)
    assert says_in_one_line_what_it_is(specimen)


def test_source_of_any_format_and_layout_gives_the_same_weights(
    specimen: Specimen, convert: Callable[..., Conversion], tmp_path: Path
) -> None:
    for options in ({"to": "dcp"}, {"to": "dcp", "rope": "half_split"}, {"to": "meta"}):
        name = "-".join(options.values())
        convert(sample_path(), name, verified=False, **options)
        other = lesson.open_specimen(tmp_path / name)
        assert other.params == specimen.params
        for key, weight in specimen.half_split.items():
            assert torch.equal(other.half_split[key], weight), key


def test_rotated_points_keep_their_length_and_rotate_as_in_transformers(
    specimen: Specimen,
) -> None:
    rotated = lesson.rotated_pairs(specimen, 20)
    assert says_in_one_line_what_it_is(rotated)
    lengths = rotated.points.norm(dim=-1)
    torch.testing.assert_close(lengths, lengths[:1].expand_as(lengths))
    angles_PF = rope.angles(torch.arange(20), inverse_frequencies(specimen))
    cos, sin = (torch.cat([angles_PF] * 2, -1)[None] for _ in range(2))
    q_1HD, k_1GD = projected(specimen, "half_split", specimen.excerpt[:1])
    q, k = (x.expand(20, -1, -1).transpose(0, 1)[None] for x in (q_1HD, k_1GD))
    expected, _ = apply_rotary_pos_emb(q, k, cos.cos(), sin.sin())
    for at, pair in enumerate(rotated.pairs):
        found = expected[0, 0][:, [pair, pair + rotated.head_dim // 2]]
        torch.testing.assert_close(rotated.points[:, at], found)


def test_one_rotation_in_two_forms_gives_the_same_numbers(specimen: Specimen) -> None:
    for _, _, before, as_complex, by_cosine in lesson.two_forms(specimen).rows:
        real, imaginary = str(as_complex).rstrip("i").split(" ")
        assert f"({real}, {float(imaginary):.2f})" == by_cosine != before


def test_scores_agree_with_the_matching_rotation_only(specimen: Specimen) -> None:
    found = lesson.agreement(specimen)
    assert max(found.unrotated, found.matching) < 1e-5
    assert min(found.projections, found.mismatched) > 0.5
    assert [row[-1] for row in found.table().rows] == ["no", "yes", "yes", "no"]


def test_error_is_zero_at_distance_0_and_grows_if_q_and_k_are_reordered_alike(
    specimen: Specimen,
) -> None:
    found = lesson.score_errors(specimen)
    assert says_in_one_line_what_it_is(found)
    errors = found.by_variant
    assert errors[RIGHT.name].max() < 1e-5
    for name in ("not reordered", "wrong direction", "twice"):
        assert errors[name][0] < 1e-5
        assert 0.1 < errors[name][1] < errors[name][2:4].mean() < errors[name][8:].mean()


def test_error_is_large_at_distance_0_if_q_and_k_are_reordered_differently(
    specimen: Specimen,
) -> None:
    errors = lesson.score_errors(specimen).by_variant
    assert min(errors["only q"][0], errors["wrong kv heads"][0]) > 1


def test_no_two_variants_give_the_same_weights(specimen: Specimen) -> None:
    made = {variant.name: specimen.apply_variant(variant) for variant in variants(specimen.params)}
    assert len(made) == 6
    assert says_in_one_line_what_it_is(RIGHT)
    for name, weights in made.items():
        for other, others in made.items():
            same = all(torch.equal(weights[r, 0], others[r, 0]) for r in ("wq", "wk"))
            assert same == (name == other)
    assert torch.equal(made["right"]["wq", 1], specimen.interleaved["wq", 1])
    assert torch.equal(made["only q"]["wk", 1], specimen.half_split["wk", 1])


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "expected"),
    [(8, 2, 16, 8), (8, 8, 16, 1), (3, 2, 16, 1), (1, 1, 16, 2), (1, 1, 10, None)],
)
def test_wrong_kv_heads_is_a_variant_only_if_heads_can_be_miscounted(
    heads: int, kv_heads: int, head_dim: int, expected: int | None
) -> None:
    params = replace(checkpoints.GQA, n_heads=heads, n_kv_heads=kv_heads, head_dim=head_dim)
    assert wrong_kv_heads(params) == expected
    names = [variant.name for variant in wrong_variants(params)]
    assert ("wrong kv heads" in names) == (expected is not None)


def test_the_right_loss_is_that_of_transformers(
    losses: lesson.Losses, specimen: Specimen, reference: AutoModelForCausalLM
) -> None:
    with torch.no_grad():
        expected = reference(specimen.tokens, labels=specimen.tokens).loss.item()
    assert losses.means[RIGHT.name] == pytest.approx(expected, abs=1e-4)
    assert says_in_one_line_what_it_is(losses)


def test_every_wrong_variant_costs_more_than_two_nats_and_more_with_more_text(
    losses: lesson.Losses,
) -> None:
    right = losses.by_name[RIGHT.name]
    for name, wrong in losses.by_name.items():
        if name == RIGHT.name:
            continue
        assert losses.means[name] > losses.means[RIGHT.name] + 2
        assert losses.means[name] < math.log(256), "even the wrong ones know some letters"
        excess = wrong - right
        assert abs(excess[0]) < 1e-5
        assert 0 < excess[1] < excess[4:16].mean() < excess[128:].mean()


def test_attention_sums_to_one_and_the_head_of_the_lesson_looks_one_back(
    specimen: Specimen,
) -> None:
    maps = lesson.attention_maps(specimen, 1, 0)
    assert says_in_one_line_what_it_is(maps)
    for found in maps.by_variant.values():
        torch.testing.assert_close(found.sum(-1), torch.ones(len(found)))
    before = {name: one.diagonal(-1).mean().item() for name, one in maps.by_variant.items()}
    right = before.pop(RIGHT.name)
    assert right > 0.4 > 2 * max(before.values())
    assert min(maps.moved.values()) > 0.5


def test_attention_is_that_of_transformers(
    specimen: Specimen, reference: AutoModelForCausalLM
) -> None:
    reference.set_attn_implementation("eager")
    with torch.no_grad():
        expected = reference(specimen.excerpt[None], output_attentions=True).attentions[1][0]
    found = attention(specimen, 1)[RIGHT.name]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_both_solutions_give_the_same_loss_and_mismatches_do_not(specimen: Specimen) -> None:
    out = lesson.two_solutions(specimen)
    assert out.agree and out.logits < 1e-4
    means = lesson.losses_by_layout(specimen).means
    right = [mean for mean in means.values() if mean < 2]
    assert len(right) == 2 and right[0] == pytest.approx(right[1], abs=1e-4)
    assert sorted(means.values())[2] > 4


def test_solutions_with_other_logits_or_losses_do_not_agree() -> None:
    assert not lesson.TwoSolutions({"one": 1.5, "other": 1.5}, 0.1, "byte").agree
    assert not lesson.TwoSolutions({"one": 1.5, "other": 1.6}, 0.0, "byte").agree


def test_both_solutions_continue_a_prompt_as_transformers_does(
    specimen: Specimen, reference: AutoModelForCausalLM
) -> None:
    prompt = list(lesson.PROMPT.encode())
    tokens = torch.tensor([prompt])
    expected = reference.generate(tokens, max_new_tokens=20, do_sample=False, pad_token_id=0)
    expected = expected[0, len(prompt) :].tolist()
    runs = [
        Run(RIGHT),
        Run(NOT_REORDERED, "half_split"),
        *map(Run, wrong_variants(specimen.params)),
    ]
    woven, split, *wrong = continued(specimen, runs, prompt, 20)
    assert woven == split == expected
    assert expected not in wrong


def test_no_continuation_depends_on_rounding(specimen: Specimen) -> None:
    """The most likely byte leads clearly, so that the notebook shows the same everywhere."""
    prompt = list(lesson.PROMPT.encode())
    every = variants(specimen.params)
    written = continued(specimen, [Run(variant) for variant in every], prompt, 40)
    for variant, made in zip(every, written, strict=True):
        weights, tokens = specimen.apply_variant(variant), torch.tensor([prompt + made])
        with torch.no_grad():
            logits = forward.forward(weights, specimen.params, tokens, "interleaved")[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == made
        best = logits[len(prompt) - 1 : -1].topk(2).values
        assert (best[:, 0] - best[:, 1]).min() > 1e-3


def test_scaling_keeps_fast_pairs_and_divides_slow_ones() -> None:
    found = lesson.stretch()
    assert says_in_one_line_what_it_is(found)
    plain, scaled, more = found.by_name.values()
    end = found.kept + found.blended
    assert torch.equal(plain[: found.kept], scaled[: found.kept])
    torch.testing.assert_close(plain[end:] / scaled[end:], torch.full((64 - end,), 8.0))
    torch.testing.assert_close(plain[end:] / more[end:], torch.full((64 - end,), 32.0))
    between = (plain / scaled)[found.kept : end]
    assert ((between > 1) & (between < 8)).all()


@pytest.mark.parametrize(("trained", "run"), [("Llama 3.2", "Llama 3.1"), ("Llama 3", "Llama 3.1")])
def test_wrong_scaling_has_no_error_at_short_distances(trained: str, run: str) -> None:
    found = lesson.mismatch(trained, run)
    assert says_in_one_line_what_it_is(found)
    assert found.at(0) == 0
    assert found.at(16) < 0.01 < found.at(4096) < found.at(30000)
    assert lesson.mismatch(run, run).errors.max() == 0


@pytest.mark.parametrize("fault", ["scaling", "layout"])
def test_the_errors_of_a_llamas_head_are_those_of_random_q_and_k(fault: str) -> None:
    """Against scores of many random vectors, which are not computed from matrices."""
    q, k = torch.randn(2, 1, 4000, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    both = torch.cat([k, q])
    plain = rope.inverse_frequencies(HEAD_DIM, THETA)
    found, other, layout = lesson.layout_mismatch(), plain, "interleaved"
    if fault == "scaling":
        found, layout = lesson.mismatch("Llama 3", "Llama 3.1"), "half_split"
        other = rope.inverse_frequencies(HEAD_DIM, THETA, lesson.LLAMAS["Llama 3.1"])
    for distance in (1, 64, 1024, 8192):
        at = torch.tensor([0, distance])
        right = rope.scores(both, both, rope.angles(at, plain), "half_split")[:, 1, 0]
        wrong = rope.scores(both, both, rope.angles(at, other), layout)[:, 1, 0]
        measured = ((wrong - right).square().mean() / right.square().mean()).sqrt().item()
        assert found.at(distance) == pytest.approx(measured, rel=0.1, abs=1e-4)


def test_wrong_layout_has_an_error_at_distance_1_that_grows() -> None:
    found = lesson.layout_mismatch()
    assert found.at(0) == 0
    steps = [found.at(4**power) for power in range(6)]
    assert steps[0] > 0.2 and steps == sorted(steps) and steps[-1] > 1.2


def test_untrained_scaling_costs_only_at_late_positions(specimen: Specimen) -> None:
    trained, other = lesson.stretched_losses(specimen).by_name.values()
    excess = other - trained
    assert excess[:16].mean() < 0.1 < 0.5 < excess[128:].mean()


def test_source_that_cannot_run_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="hf://a/b: the lesson runs the model"):
        lesson.open_specimen("hf://a/b")
    params = replace(checkpoints.GQA, head_dim=4, n_layers=1)
    small = checkpoints.write(
        tmp_path / "small", checkpoints.tensors(params), head_dim=4, num_hidden_layers=1
    )
    with pytest.raises(RefusedError, match="heads of 4 rows; the lesson needs 8 or more"):
        lesson.open_specimen(small)
    billions = replace(checkpoints.GQA, dim=4096, ffn_dim=14336, vocab_size=128256)
    large = checkpoints.write_holes(tmp_path / "large", billions, 1)
    with pytest.raises(
        RefusedError, match=r"large: has 3.17 billion parameters .6.35 GB.* 1.6 billion"
    ):
        lesson.open_specimen(large)
