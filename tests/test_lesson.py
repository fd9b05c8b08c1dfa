"""What the lesson claims, on the sample; against transformers where it has the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import checkpoints
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from llamaconv import RefusedError, lesson, model, rope, sample_path
from llamaconv.convert import Conversion
from llamaconv.lesson import RIGHT, Specimen, ways, wrong_ways
from llamaconv.lesson.llama_head import HEAD_DIM, THETA
from llamaconv.lesson.outcomes import continued
from llamaconv.lesson.turns import inverse_frequencies, projected
from llamaconv.lesson.ways import wrong_kv_heads


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


def test_a_source_of_any_format_and_layout_tells_the_same_story(
    specimen: Specimen, convert: Callable[..., Conversion], tmp_path: Path
) -> None:
    for options in ({"to": "dcp"}, {"to": "dcp", "rope": "half_split"}, {"to": "meta"}):
        name = "-".join(options.values())
        convert(sample_path(), name, verified=False, **options)
        other = lesson.open_specimen(tmp_path / name)
        assert other.params == specimen.params
        for key, weight in specimen.half_split.items():
            assert torch.equal(other.half_split[key], weight), key


def test_turned_points_keep_their_length_and_turn_as_transformers_turns_them(
    specimen: Specimen,
) -> None:
    turned = lesson.turned_pairs(specimen, 20)
    lengths = turned.points.norm(dim=-1)
    torch.testing.assert_close(lengths, lengths[:1].expand_as(lengths))
    angles_PF = rope.angles(torch.arange(20), inverse_frequencies(specimen))
    cos, sin = (torch.cat([angles_PF] * 2, -1)[None] for _ in range(2))
    q_1HD, k_1GD = projected(specimen, "half_split", specimen.excerpt[:1])
    q, k = (x.expand(20, -1, -1).transpose(0, 1)[None] for x in (q_1HD, k_1GD))
    expected, _ = apply_rotary_pos_emb(q, k, cos.cos(), sin.sin())
    for at, pair in enumerate(turned.pairs):
        found = expected[0, 0][:, [pair, pair + turned.head_dim // 2]]
        torch.testing.assert_close(turned.points[:, at], found)


def test_the_same_turn_written_two_ways_gives_the_same_numbers(specimen: Specimen) -> None:
    for _, _, before, as_complex, by_cosine in lesson.two_writings(specimen).rows:
        real, imaginary = str(as_complex).rstrip("i").split(" ")
        assert f"({real}, {float(imaginary):.2f})" == by_cosine != before


def test_scores_agree_with_the_matching_rotation_only(specimen: Specimen) -> None:
    found = lesson.agreement(specimen)
    assert max(found.unrotated, found.matching) < 1e-5
    assert min(found.projections, found.mismatched) > 0.5
    assert [row[-1] for row in found.table().rows] == ["no", "yes", "yes", "no"]


def test_the_error_is_zero_on_the_diagonal_and_grows_where_q_and_k_are_treated_alike(
    specimen: Specimen,
) -> None:
    errors = lesson.score_errors(specimen).by_way
    assert errors[RIGHT.name].max() < 1e-5
    for name in ("not re-ordered", "wrong direction", "twice"):
        assert errors[name][0] < 1e-5
        assert 0.1 < errors[name][1] < errors[name][2:4].mean() < errors[name][8:].mean()


def test_where_q_and_k_are_treated_differently_even_the_diagonal_is_wrong(
    specimen: Specimen,
) -> None:
    errors = lesson.score_errors(specimen).by_way
    assert min(errors["only q"][0], errors["wrong kv heads"][0]) > 1


def test_every_way_is_another_one(specimen: Specimen) -> None:
    made = {way.name: specimen.gone(way) for way in ways(specimen.params)}
    assert len(made) == 6
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
def test_kv_heads_are_miscounted_only_where_they_can_be(
    heads: int, kv_heads: int, head_dim: int, expected: int | None
) -> None:
    params = replace(checkpoints.GQA, n_heads=heads, n_kv_heads=kv_heads, head_dim=head_dim)
    assert wrong_kv_heads(params) == expected
    names = [way.name for way in wrong_ways(params)]
    assert ("wrong kv heads" in names) == (expected is not None)


def test_the_right_loss_is_that_of_transformers(
    losses: lesson.Losses, specimen: Specimen, reference: AutoModelForCausalLM
) -> None:
    with torch.no_grad():
        expected = reference(specimen.tokens, labels=specimen.tokens).loss.item()
    assert losses.mean(RIGHT.name) == pytest.approx(expected, abs=1e-4)


def test_every_wrong_way_costs_more_than_two_nats_and_more_with_more_text(
    losses: lesson.Losses,
) -> None:
    right = losses.by_name[RIGHT.name]
    for name, wrong in losses.by_name.items():
        if name == RIGHT.name:
            continue
        assert losses.mean(name) > losses.mean(RIGHT.name) + 2
        assert losses.mean(name) < math.log(256), "even the wrong ones know some letters"
        excess = wrong - right
        assert abs(excess[0]) < 1e-5
        assert 0 < excess[1] < excess[4:16].mean() < excess[128:].mean()


def test_attention_sums_to_one_and_the_head_of_the_lesson_looks_one_back(
    specimen: Specimen,
) -> None:
    maps = lesson.attention_maps(specimen, 1, 0)
    for found in maps.by_way.values():
        torch.testing.assert_close(found.sum(-1), torch.ones(len(found)))
    before = {name: one.diagonal(-1).mean().item() for name, one in maps.by_way.items()}
    right = before.pop(RIGHT.name)
    assert right > 0.4 > 2 * max(before.values())
    assert min(maps.moved.values()) > 0.5


def test_attention_is_that_of_transformers(
    specimen: Specimen, reference: AutoModelForCausalLM
) -> None:
    reference.set_attn_implementation("eager")
    with torch.no_grad():
        expected = reference(specimen.excerpt[None], output_attentions=True).attentions[1][0]
    torch.testing.assert_close(specimen.attention(RIGHT, 1), expected, atol=1e-4, rtol=1e-3)


def test_both_ways_out_give_one_model_and_the_two_between_do_not(specimen: Specimen) -> None:
    out = lesson.ways_out(specimen)
    assert out.agree and out.logits < 1e-4
    means = lesson.losses_by_layout(specimen).means
    right = [mean for mean in means.values() if mean < 2]
    assert len(right) == 2 and right[0] == pytest.approx(right[1], abs=1e-4)
    assert sorted(means.values())[2] > 4


def test_a_disagreement_would_be_said() -> None:
    assert not lesson.WaysOut({"one": 1.5, "other": 1.5}, 0.1, "byte").agree
    assert not lesson.WaysOut({"one": 1.5, "other": 1.6}, 0.0, "byte").agree


def test_both_ways_out_continue_as_transformers_does(
    specimen: Specimen, reference: AutoModelForCausalLM
) -> None:
    prompt = torch.tensor(list(b'Return "True" if *x* is in '))
    expected = reference.generate(prompt[None], max_new_tokens=20, do_sample=False, pad_token_id=0)
    expected = expected[0, len(prompt) :].tolist()
    assert continued(specimen, specimen.interleaved, prompt, 20) == expected
    assert continued(specimen, specimen.half_split, prompt, 20, "half_split") == expected
    for way in wrong_ways(specimen.params):
        assert continued(specimen, specimen.gone(way), prompt, 20) != expected


def test_no_continuation_hangs_on_a_rounding(specimen: Specimen) -> None:
    """The most likely byte leads clearly, so that the notebook shows the same everywhere."""
    prompt = torch.tensor(list(b'Return "True" if *x* is in '))
    for way in ways(specimen.params):
        weights = specimen.gone(way)
        tokens = torch.cat([prompt, torch.tensor(continued(specimen, weights, prompt, 40))])
        with torch.no_grad():
            logits = model.forward(weights, specimen.params, tokens[None], "interleaved")[0]
        best = logits[len(prompt) - 1 : -1].topk(2).values
        assert (best[:, 0] - best[:, 1]).min() > 1e-3


def test_scaling_keeps_fast_pairs_and_divides_slow_ones() -> None:
    found = lesson.stretch()
    plain, scaled, more = found.by_name.values()
    end = found.kept + found.blended
    assert torch.equal(plain[: found.kept], scaled[: found.kept])
    torch.testing.assert_close(plain[end:] / scaled[end:], torch.full((64 - end,), 8.0))
    torch.testing.assert_close(plain[end:] / more[end:], torch.full((64 - end,), 32.0))
    between = (plain / scaled)[found.kept : end]
    assert ((between > 1) & (between < 8)).all()


@pytest.mark.parametrize(("trained", "run"), [("Llama 3.2", "Llama 3.1"), ("Llama 3", "Llama 3.1")])
def test_a_wrong_factor_hides_at_short_distances(trained: str, run: str) -> None:
    found = lesson.mismatch(trained, run)
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


def test_a_wrong_layout_shows_at_once_in_a_llamas_head_and_grows() -> None:
    found = lesson.layout_mismatch()
    assert found.at(0) == 0
    steps = [found.at(4**power) for power in range(6)]
    assert steps[0] > 0.2 and steps == sorted(steps) and steps[-1] > 1.2


def test_a_factor_that_was_not_trained_costs_far_back_only(specimen: Specimen) -> None:
    trained, other = lesson.stretched_losses(specimen).by_name.values()
    excess = other - trained
    assert excess[:16].mean() < 0.1 < 0.5 < excess[128:].mean()


def test_what_cannot_be_run_is_refused_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RefusedError, match="hf://a/b: the lesson runs the model"):
        lesson.open_specimen("hf://a/b")
    params = replace(checkpoints.GQA, head_dim=4, n_layers=1)
    small = checkpoints.write(
        tmp_path / "small", checkpoints.tensors(params), head_dim=4, num_hidden_layers=1
    )
    with pytest.raises(RefusedError, match="heads of 4 rows; the lesson needs 8 or more"):
        lesson.open_specimen(small)
    monkeypatch.setattr("llamaconv.lesson.specimen.MOST_BYTES", 1000)
    with pytest.raises(RefusedError, match=r"1.64 MB of weights.* up to 1 kB"):
        lesson.open_specimen(sample_path())


def test_values_say_in_one_line_what_they_are(specimen: Specimen, losses: lesson.Losses) -> None:
    shown = [
        specimen,
        losses,
        RIGHT,
        lesson.turned_pairs(specimen),
        lesson.score_errors(specimen, windows=1),
        lesson.attention_maps(specimen, 0, 0),
        lesson.stretch(),
        lesson.mismatch("Llama 3", "Llama 3.1"),
    ]
    for value in shown:
        assert len(repr(value).splitlines()) == 1
        assert len(repr(value)) < 200
