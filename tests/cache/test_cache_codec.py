"""Uncentred PCA, quantisation and fidelity against scikit-learn, numpy and hand-made cases."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.decomposition import TruncatedSVD

from pipeline.cache.codec import (
    ComponentMaxima,
    Fidelity,
    ScaleCodec,
    SecondMoment,
    dequantise,
    fit_basis,
    to_float16,
)
from pipeline.errors import PipeError

coefficients = arrays(np.float32, (3, 4, 5), elements=st.floats(-1e4, 1e4, width=32))


@pytest.fixture
def features() -> np.ndarray:
    """(40, 9, 12) with a strong mean direction and a decaying spectrum."""
    rng = np.random.default_rng(0)
    spectrum = np.linspace(3, 0.1, 12)
    return (rng.normal(size=(40, 9, 12)) * spectrum + 2 * rng.normal(size=12)).astype(np.float32)


def moment_of(features: np.ndarray, batch: int = 7) -> SecondMoment:
    moment = SecondMoment(features.shape[-1])
    for start in range(0, len(features), batch):
        moment.update(features[start : start + batch])
    return moment


def test_second_moment_of_batches_equals_that_of_all_rows(features: np.ndarray) -> None:
    flat = features.reshape(-1, 12).astype(np.float64)
    np.testing.assert_allclose(moment_of(features).matrix, flat.T @ flat / len(flat), rtol=1e-12)


def test_second_moment_accumulates_in_float64() -> None:
    moment = SecondMoment(1)
    moment.update(np.full((1, 1, 1), 1e4, np.float32))  # 1e8: float32 would lose the additions of 1 below
    for _ in range(100):
        moment.update(np.ones((1, 1, 1), np.float32))
    assert moment.matrix[0, 0] * moment.tokens == 1e8 + 100


def test_second_moment_without_rows_says_so() -> None:
    with pytest.raises(PipeError, match="no calibration features"):
        _ = SecondMoment(3).matrix


def test_basis_spans_the_leading_right_singular_vectors_of_uncentred_features(features: np.ndarray) -> None:
    basis, explained = fit_basis(moment_of(features), 5)
    flat = features.reshape(-1, 12).astype(np.float64)
    reference = TruncatedSVD(5, algorithm="arpack", random_state=0).fit(flat)
    assert basis is not None
    assert basis.shape == (12, 5)
    assert basis.dtype == np.float32
    np.testing.assert_allclose(np.abs((reference.components_ @ basis).diagonal()), 1, atol=1e-5)
    share = (reference.singular_values_**2).sum() / (flat**2).sum()
    assert explained == pytest.approx(share, rel=1e-9)


def test_basis_keeps_the_mean_direction(features: np.ndarray) -> None:
    shifted = features + 100
    basis, _ = fit_basis(moment_of(shifted), 1)
    assert basis is not None
    mean = shifted.reshape(-1, 12).mean(axis=0)
    assert abs(float(mean @ basis[:, 0])) / np.linalg.norm(mean) > 0.9999


def test_largest_entry_of_each_basis_vector_is_positive(features: np.ndarray) -> None:
    basis, _ = fit_basis(moment_of(features), 12)
    negated, _ = fit_basis(moment_of(-features), 12)
    assert basis is not None
    assert negated is not None
    assert (np.take_along_axis(basis, np.abs(basis).argmax(axis=0)[None], axis=0) > 0).all()
    np.testing.assert_array_equal(basis, negated)


def test_more_components_than_channels_keep_all_of_them(features: np.ndarray) -> None:
    basis, explained = fit_basis(moment_of(features), 256)
    assert basis is not None
    assert basis.shape == (12, 12)
    assert explained == pytest.approx(1)


def test_no_pca_means_no_basis_and_untouched_features(features: np.ndarray) -> None:
    basis, explained = fit_basis(moment_of(features), None)
    codec = ScaleCodec("float16", 12, basis)
    assert (basis, explained, codec.components) == (None, 1.0, 12)
    np.testing.assert_array_equal(codec.project(features), features)


def test_inner_products_of_coefficients_are_those_of_projected_features(features: np.ndarray) -> None:
    basis, _ = fit_basis(moment_of(features), 4)
    assert basis is not None
    y = ScaleCodec("float16", 12, basis).project(features).reshape(-1, 4).astype(np.float64)
    projector = basis.astype(np.float64) @ basis.T
    projected = features.reshape(-1, 12) @ projector
    np.testing.assert_allclose(y @ y.T, projected @ projected.T, atol=1e-3)


def test_full_basis_preserves_every_gram_matrix(features: np.ndarray) -> None:
    basis, _ = fit_basis(moment_of(features), 12)
    y = ScaleCodec("float16", 12, basis).project(features[0]).astype(np.float64)
    np.testing.assert_allclose(y @ y.T, features[0].astype(np.float64) @ features[0].T, rtol=1e-4, atol=1e-4)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(coefficients)
def test_int8_error_is_at_most_half_a_step_for_calibrated_values(values: np.ndarray) -> None:
    maxima = ComponentMaxima(5)
    maxima.update(values[:2])
    maxima.update(values[2:])
    codec = ScaleCodec("int8", 5).with_steps(maxima.steps())
    assert codec.steps is not None
    stored = codec.quantise(values)
    assert stored.saturated == 0
    error = np.abs(codec.dequantise(stored.values).astype(np.float64) - values)
    assert (error <= codec.steps * 0.5001 + 1e-30).all()


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(coefficients)
def test_int8_token_error_is_at_most_half_of_the_tokens_own_step(values: np.ndarray) -> None:
    codec = ScaleCodec("int8_token", 5)
    stored = codec.quantise(values)
    assert stored.token_steps is not None
    assert stored.token_steps.shape == (3, 4)
    error = np.abs(codec.dequantise(stored.values, stored.token_steps).astype(np.float64) - values)
    assert (error <= np.abs(values).max(axis=-1, keepdims=True) / 127 * 0.5001 + 1e-30).all()
    restored = codec.dequantise(stored.values, stored.token_steps)
    np.testing.assert_allclose(np.abs(restored).max(axis=-1), np.abs(values).max(axis=-1), rtol=1e-6, atol=1e-36)


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(coefficients)
def test_negated_coefficients_are_stored_negated(values: np.ndarray) -> None:
    codec = ScaleCodec("int8", 5).with_steps(np.full(5, 17.0))
    np.testing.assert_array_equal(codec.quantise(-values).values, -codec.quantise(values).values)


def test_int8_rounds_half_to_even_and_clips_counting_what_it_cut() -> None:
    codec = ScaleCodec("int8", 1).with_steps(np.ones(1))
    y = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 127.4, 127.6, -128, 1e6], np.float32).reshape(1, -1, 1)
    stored = codec.quantise(y)
    assert stored.values.ravel().tolist() == [0, 2, 2, 0, -2, 127, 127, -127, 127]
    assert stored.saturated == 3


def test_a_component_that_never_moved_has_a_usable_step() -> None:
    maxima = ComponentMaxima(2)
    maxima.update(np.array([[[0.0, 12.7]]], np.float32))
    np.testing.assert_allclose(maxima.steps(), [0.1, 0.1], rtol=1e-6)
    assert (ComponentMaxima(2).steps() > 0).all()


def test_a_token_of_zeros_stays_zero() -> None:
    codec = ScaleCodec("int8_token", 3)
    stored = codec.quantise(np.zeros((1, 2, 3), np.float32))
    assert not codec.dequantise(stored.values, stored.token_steps).any()


def test_float16_is_rounded_and_never_infinite() -> None:
    values, cut = to_float16(np.array([1.0001, 7e4, -1e9, 65504], np.float32))
    assert values.tolist() == [1.0, 65504.0, -65504.0, 65504.0]
    assert cut == 2


@pytest.mark.parametrize("dtype", ["int8", "int8_token", "float16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused(dtype: str, bad: float) -> None:
    codec = ScaleCodec(dtype, 2, None, np.ones(2, np.float32))  # type: ignore[arg-type]
    with pytest.raises(PipeError, match="not finite"):
        codec.encode(np.array([[[1.0, bad]]], np.float32))


def test_int8_without_calibration_is_refused() -> None:
    with pytest.raises(ValueError, match="steps"):
        ScaleCodec("int8", 2).quantise(np.ones((1, 1, 2), np.float32))


def test_dequantise_tells_component_steps_from_token_steps() -> None:
    values = np.ones((2, 2, 2), np.int8)
    np.testing.assert_array_equal(dequantise(values, np.array([1, 2], np.float32))[0, 0], [1, 2])
    np.testing.assert_array_equal(dequantise(values, np.array([[1, 2], [3, 4]], np.float32))[1, 0], [3, 3])


def test_fidelity_of_untouched_features_is_perfect(features: np.ndarray) -> None:
    measure = Fidelity()
    measure.update(features, features, None)
    found = measure.result()
    assert found["cosine_mean"] == pytest.approx(1)
    assert found["cosine_worst_1pct"] == pytest.approx(1)
    assert found["gram_rms"] == pytest.approx(0, abs=1e-7)
    assert found["relative_l2"] == 0
    assert found["images"] == len(features)


def test_fidelity_equals_a_reference_on_projected_quantised_features(features: np.ndarray) -> None:
    basis, _ = fit_basis(moment_of(features), 3)
    assert basis is not None
    codec = ScaleCodec("int8", 12, basis).with_steps(np.full(3, 0.2))
    y = codec.dequantise(codec.encode(features).values)
    measure = Fidelity()
    measure.update(features[:11], y[:11], basis)
    measure.update(features[11:], y[11:], basis)
    found = measure.result()
    x, x_hat = features.astype(np.float64), y.astype(np.float64) @ basis.T
    cosines = (x * x_hat).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(x_hat, axis=-1)
    unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
    unit_hat = x_hat / np.linalg.norm(x_hat, axis=-1, keepdims=True)  # V is orthonormal: the same Gram as the y's
    difference = np.einsum("nic,njc->nij", unit_hat, unit_hat) - np.einsum("nic,njc->nij", unit, unit)
    assert found["cosine_mean"] == pytest.approx(cosines.mean(), abs=1e-6)
    assert found["cosine_worst_1pct"] == pytest.approx(np.quantile(cosines, 0.01), abs=1e-5)
    assert found["gram_mean_abs"] == pytest.approx(np.abs(difference).mean(), rel=1e-4)
    assert found["gram_rms"] == pytest.approx(np.sqrt((difference**2).mean()), rel=1e-4)
    assert found["relative_l2"] == pytest.approx(np.linalg.norm(x - x_hat) / np.linalg.norm(x), rel=1e-6)


def test_fidelity_falls_when_components_are_dropped(features: np.ndarray) -> None:
    means = []
    for kept in (12, 6, 2):
        basis, _ = fit_basis(moment_of(features), kept)
        measure = Fidelity()
        measure.update(features, ScaleCodec("float16", 12, basis).project(features), basis)
        means.append(measure.result()["cosine_mean"])
    assert means[0] > means[1] > means[2]


def test_fidelity_without_rows_says_so() -> None:
    with pytest.raises(PipeError, match="held-out"):
        Fidelity().result()
