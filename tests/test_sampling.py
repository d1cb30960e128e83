"""Claims about drawing tokens. That the distribution is the softmax's is tested beside Suno's filters in test_against_suno."""

import secrets

import numpy as np
import pytest

from barkstream.sampling import (
    COARSE,
    FINE,
    SEMANTIC,
    Sampling,
    draw,
    ends,
    gumbel_noise,
    keep_likely,
    sentence_seed,
    uniforms,
    uniforms_of_positions,
)


def test_noise_is_a_function_of_seed_stage_and_position():
    noise = gumbel_noise(3, SEMANTIC, 7, 100)
    np.testing.assert_array_equal(noise, gumbel_noise(3, SEMANTIC, 7, 100))
    for other in (
        gumbel_noise(4, SEMANTIC, 7, 100),
        gumbel_noise(3, COARSE, 7, 100),
        gumbel_noise(3, SEMANTIC, 8, 100),
    ):
        assert np.abs(np.corrcoef(noise, other)[0, 1]) < 0.4


def test_a_shorter_vocabulary_draws_the_same_noise():
    np.testing.assert_array_equal(uniforms(3, SEMANTIC, 7, 101), uniforms(3, SEMANTIC, 7, 1000)[:101])


def test_uniforms_are_what_philox_says():
    words = np.random.Philox(
        key=np.array([9, SEMANTIC], np.uint64), counter=np.array([0, 5, 0, 0], np.uint64)
    ).random_raw(2)
    low, high = int(words[0]) & 0xFFFFFFFF, int(words[0]) >> 32
    np.testing.assert_allclose(uniforms(9, SEMANTIC, 5, 2), [(low + 0.5) / 2**32, (high + 0.5) / 2**32], rtol=1e-6)


def test_noise_is_finite_and_has_gumbels_mean():
    noise = np.concatenate([gumbel_noise(1, SEMANTIC, i, 10_001) for i in range(50)])
    assert np.isfinite(noise).all()
    assert noise.mean() == pytest.approx(0.5772, abs=0.01)
    assert noise.std() == pytest.approx(np.pi / np.sqrt(6), abs=0.01)


def test_temperature_zero_takes_the_largest_logit():
    logits = np.array([0.1, 3, 2.9], np.float32)
    assert draw(logits, np.array([0, -100, 100], np.float32), Sampling(temperature=0))[0] == 1


def test_filters_keep_what_they_should():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    kept = lambda *filters: np.isfinite(keep_likely(logits, *filters)).tolist()  # noqa: E731
    assert kept(0, 1.0) == [True, True, True, True]
    assert kept(2, 1.0) == [True, True, False, False]
    assert kept(0, 0.6) == [True, True, False, False]  # the one that crosses the limit stays
    assert kept(0, 1e-6) == [True, False, False, False]
    assert kept(1, 0.9) == [True, False, False, False]


def test_speech_ends_when_the_end_token_is_likely_enough():
    tempered = np.log(np.array([0.7, 0.3], np.float32))
    assert ends(1, tempered, 1, Sampling(min_eos_p=1))
    assert not ends(0, tempered, 1, Sampling(min_eos_p=0.31))
    assert ends(0, tempered, 1, Sampling(min_eos_p=0.29))


def test_sentences_have_seeds_of_their_own():
    seeds = {sentence_seed(seed, index) for seed in range(50) for index in range(50)}
    assert len(seeds) == 2500
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("n", [1, 6, 8, 9, 40])
def test_numbers_of_many_positions_are_those_of_each(n):
    seed, positions = secrets.randbits(63), np.array([0, 1, 7, 1_000, 2**40])
    together = uniforms_of_positions(seed, FINE, positions, n)
    assert together.dtype == np.float32
    np.testing.assert_array_equal(together, [uniforms(seed, FINE, int(position), n) for position in positions])
