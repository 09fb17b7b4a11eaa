"""The correlator: against independent simulators, and what each switch does to numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from edgeattn.device import Effects, Optics
from edgeattn.targets.optical.convolve import Convolver, direct
from edgeattn.targets.optical.physics import Correlator, ideal_field, ideal_spectrum, rounded
from edgeattn.targets.optical.schedule import Workload


def correlator(side: int = 32, **effects: object) -> Correlator:
    made = Effects(**effects)  # type: ignore[arg-type]
    return Correlator(made, (side, side), torch.Generator().manual_seed(made.seed))


def distance(reference: Tensor, other: Tensor) -> float:
    return float((other - reference).norm() / reference.norm())


def blobs(side: int, count: int, spread: float, width: float, seed: int) -> Tensor:
    """A smooth picture (side, side) around its middle, narrow in space and in frequency."""
    generator = torch.Generator().manual_seed(seed)
    at = torch.arange(side, dtype=torch.float64) - side // 2
    picture = torch.zeros(side, side, dtype=torch.float64)
    for _ in range(count):
        down, right = (torch.rand(2, generator=generator).double() - 0.5) * 2 * spread
        strength = torch.rand(1, generator=generator).double()
        picture += strength * torch.exp(-((at[:, None] - down) ** 2 + (at - right) ** 2) / (2 * width**2))
    return picture


def centred(transform, plane: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    return torch.fft.fftshift(transform(torch.fft.ifftshift(plane)))


def test_two_transforms_are_what_an_independent_simulator_propagates() -> None:
    """torchoptics: free space, lens, free space, mask, free space, lens, free space; the picture turns by 180 deg."""
    import torchoptics
    from torchoptics.elements import Lens, Modulator

    side, wavelength, pitch = 97, 1e-6, 5e-4  # paraxial: what is left are 2e-7
    focal = side * pitch**2 / wavelength
    picture, kernel = blobs(side, 6, 11, 3.5, 0), blobs(side, 3, 5, 2.5, 1)
    kernel /= kernel.sum()
    mask = centred(torch.fft.fft2, kernel.to(torch.complex128))
    field = torchoptics.Field(picture.to(torch.complex128), wavelength, spacing=pitch)
    for z, element in ((1, Lens), (2, None), (3, Lens)):
        field = field.propagate_to_z(z * focal, propagation_method="ASM")
        made = Lens(side, focal, z * focal, pitch) if element else Modulator(mask, z * focal, pitch)
        field = made.double()(field)
    field = field.propagate_to_z(4 * focal, propagation_method="ASM")
    # Odd sides have a middle pixel, about which the picture turns.
    seen = torch.fft.ifftshift(field.data.abs().flip(-2, -1))
    ideal = ideal_field(
        ideal_spectrum(torch.fft.ifftshift(picture)[None], (side, side)),
        ideal_spectrum(torch.fft.ifftshift(kernel), (side, side)),
        (side, side),
    )[0]
    assert distance(ideal, seen) < 1e-4
    ours = correlator(side)
    masks = ours.masks(torch.fft.ifftshift(kernel)[None])
    assert distance(ours.field(ours.spectrum(torch.fft.ifftshift(picture)[None]), masks)[0].abs(), seen) < 1e-4


def test_two_transforms_are_eight_of_the_angular_spectrum_at_critical_sampling() -> None:
    """Fresnel's transfer function and thin lenses, on any pixels: periodic propagations, turned by 180 deg."""
    side, wavelength, pitch = 24, 532e-9, 3.74e-6
    focal = side * pitch**2 / wavelength
    generator = torch.Generator().manual_seed(0)
    picture, kernel = (torch.rand(side, side, generator=generator, dtype=torch.float64) for _ in range(2))
    frequency = torch.fft.fftfreq(side, pitch, dtype=torch.float64)
    place = (torch.arange(side, dtype=torch.float64) - side // 2) * pitch
    free = torch.exp(-1j * math.pi * wavelength * focal * (frequency[:, None] ** 2 + frequency**2))
    lens = torch.exp(-1j * math.pi * (place[:, None] ** 2 + place**2) / (wavelength * focal))

    def lensed(field: Tensor) -> Tensor:
        for _ in range(2):
            field = torch.fft.ifft2(torch.fft.fft2(field) * free)
            field = field * lens if _ == 0 else field
        return field

    mask = torch.fft.fftshift(torch.fft.fft2(torch.fft.ifftshift(kernel)))
    seen = lensed(lensed(picture.to(torch.complex128)) * mask)
    convolved = torch.fft.fftshift(
        torch.fft.ifft2(torch.fft.fft2(torch.fft.ifftshift(picture)) * torch.fft.fft2(torch.fft.ifftshift(kernel)))
    )
    turned = torch.roll(convolved.real.flip(-2, -1), (1, 1), (-2, -1))  # about pixel side // 2
    assert distance(turned, seen.abs()) < 1e-9


def test_the_focal_length_is_the_one_of_critical_sampling() -> None:
    optics = Optics(rows=2160, cols=2160, frame_rate_hz=1.0, wavelength_nm=532.0, pitch_um=3.74)
    assert optics.focal_mm == pytest.approx(56.8, abs=0.05)


@pytest.mark.parametrize("full_well", [1e3, 1e4, 3e4, 1e5])
def test_shot_noise_of_an_amplitude_is_the_same_at_any_signal(full_well: float) -> None:
    """1 / (2 sqrt(full well)) of full scale."""
    seen = correlator(sign="reference", full_well_e=full_well)
    for amplitude in (0.5, 0.8):
        intensity = torch.full((1, 200_001), amplitude**2)
        intensity[0, 0] = 1.0  # full scale
        measured = seen.detect(intensity)[0, 1:]
        assert float(measured.std()) == pytest.approx(1 / (2 * math.sqrt(full_well)), rel=0.02)
        assert float(measured.mean()) == pytest.approx(amplitude, rel=2e-3)


def test_read_noise_about_doubles_the_noise_of_what_is_dark() -> None:
    """3 electrons at 1e4: about twice at 2 % of full amplitude, and nothing at full."""
    intensity = torch.full((1, 100_001), 0.02**2)
    intensity[0, 0] = 1.0
    with_noise = float(correlator(sign="reference", full_well_e=1e4, read_noise_e=3.0).detect(intensity)[0, 1:].std())
    without = float(correlator(sign="reference", full_well_e=1e4).detect(intensity)[0, 1:].std())
    assert 1.5 < with_noise / without < 2.5


@pytest.mark.parametrize(("bits", "rms"), [(8, 0.0059), (10, 0.0021), (12, 0.00075), (14, 0.00026)])
def test_bits_of_the_camera_are_coarse_in_the_dark(bits: int, rms: float) -> None:
    """Error of uniform amplitudes whose intensity is in 2^bits levels."""
    amplitude = torch.linspace(0, 1, 400_001)[None]
    seen = correlator(sign="reference", adc_bits=bits).detect(amplitude**2)
    assert float((seen - amplitude).square().mean().sqrt()) == pytest.approx(rms, rel=0.05)


def test_a_difference_of_two_frames_has_root_two_of_the_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    work = Workload("w", 4000, 1, 1, 1, (4, 4), (4, 4), (3, 3), (1, 1))
    x = torch.rand(4000, 1, 1, 4, 4, generator=generator)
    kernels = torch.rand(1, 1, 1, 4, 4, generator=generator)
    optics = Optics(rows=400, cols=400, frame_rate_hz=1.0)
    noise = {}
    for scale, name in ((torch.ones(4, 4), "one"), (torch.where(torch.arange(16).reshape(4, 4) % 2 > 0, 1, -1), "two")):
        signed = kernels * scale
        effects = Effects(sign="kernel_split", full_well_e=1e4)
        seen = Convolver(signed, work, optics, effects)(x)
        # Frames are exposed to their own brightest pixel.
        shown = torch.cat([direct(x, part, work) for part in (signed.clamp_min(0), (-signed).clamp_min(0))])
        noise[name] = float((seen - direct(x, signed, work)).std() / shown.amax())
    assert noise["one"] == pytest.approx(1 / (2 * math.sqrt(1e4)), rel=0.06)
    assert noise["two"] == pytest.approx(math.sqrt(2) / (2 * math.sqrt(1e4)), rel=0.06)


@pytest.mark.parametrize(("shift", "figure"), [(0.25, 1e-4), (1.0, 1.6e-3), (4.0, 2.6e-2)])
def test_a_shifted_mask_disturbs_amplitudes_by_the_extent_of_its_kernel(shift: float, figure: float) -> None:
    """Planes of 256 pixels, kernels of 8."""
    generator = torch.Generator().manual_seed(0)
    errors = []
    for _ in range(8):
        picture = torch.rand(1, 64, 64, generator=generator)
        kernel = torch.zeros(1, 256, 256)
        kernel[0, :8, :8] = torch.rand(8, 8, generator=generator)
        plain, moved = correlator(256), correlator(256, mask_shift_px=(shift, 0.0))
        fields = [c.field(c.spectrum(picture), c.masks(kernel)).abs() for c in (plain, moved)]
        errors.append(distance(*fields))
    assert float(np.mean(errors)) == pytest.approx(figure, rel=0.1)


def test_where_a_tile_is_does_not_matter_to_a_shifted_mask() -> None:
    generator = torch.Generator().manual_seed(0)
    picture = torch.rand(1, 32, 32, generator=generator)
    tile = torch.rand(8, 8, generator=generator)
    moved = correlator(256, mask_shift_px=(2.0, 0.0))
    amplitudes = []
    for at in (0, 100):
        kernel = torch.zeros(1, 256, 256)
        kernel[0, at : at + 8, :8] = tile
        amplitudes.append(torch.roll(moved.field(moved.spectrum(picture), moved.masks(kernel)).abs(), -at, -2))
    assert distance(*amplitudes) < 1e-5


def test_a_camera_shifted_by_whole_pixels_reads_its_neighbours() -> None:
    image = torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(0))
    seen = correlator(16, camera_shift_px=(1.0, 2.0)).moved(image)
    assert torch.allclose(seen[0, :-1, :-2], image[0, 1:, 2:], atol=1e-5)
    half = correlator(16, camera_shift_px=(0.5, 0.0)).moved(image)
    assert torch.allclose(half[0, :-1], (image[0, :-1] + image[0, 1:]) / 2, atol=1e-5)


def test_a_quarter_turn_of_the_camera_turns_the_picture() -> None:
    image = torch.rand(1, 17, 17, generator=torch.Generator().manual_seed(0))
    seen = correlator(17, rotation_deg=90.0).moved(image)
    assert min(distance(turned, seen) for turned in (image.rot90(1, (1, 2)), image.rot90(-1, (1, 2)))) < 1e-4


def test_defocus_spreads_a_point_and_keeps_its_power() -> None:
    point = torch.zeros(1, 32, 32)
    point[0, 0, 0] = 1.0
    seen = correlator(defocus_waves=1.0)
    spot = seen.field(seen.spectrum(point), seen.masks(point)).abs().square()[0]
    assert float(spot.sum()) == pytest.approx(1.0, rel=1e-4)
    assert float(spot.max()) < 0.5
    sharp = correlator(defocus_waves=0.0)
    assert float(sharp.field(sharp.spectrum(point), sharp.masks(point)).abs().square()[0].max()) == pytest.approx(1.0)


def test_modulators_have_their_levels() -> None:
    kernel = torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(0))
    seen = correlator(16, mask_amplitude_bits=2, mask_phase_bits=2).masks(kernel)[0]
    amplitude = seen.abs() / seen.abs().max()
    assert set((amplitude * 3).round(decimals=3).flatten().tolist()) <= {0.0, 1.0, 2.0, 3.0}
    quarters = seen[amplitude > 0.1].angle() / (math.pi / 2)
    assert float((quarters - quarters.round()).abs().max()) < 1e-4
    planes = correlator(16, input_amplitude_bits=1).inputs(kernel - 0.5)
    assert len(planes.unique()) == 3  # -peak, 0, peak
    assert rounded(torch.tensor([0.26, 0.9]), None).tolist() == pytest.approx([0.26, 0.9])


def test_finer_levels_and_the_masks_own_peak_bring_numbers_closer() -> None:
    generator = torch.Generator().manual_seed(0)
    kernel = torch.zeros(1, 32, 32)
    kernel[0, :5, :5] = torch.randn(5, 5, generator=generator)
    picture = torch.rand(1, 32, 32, generator=generator)
    plain = correlator()
    exact = plain.field(plain.spectrum(picture), plain.masks(kernel)).real

    def error(**effects: object) -> float:
        seen = correlator(**effects)
        return distance(exact, seen.field(seen.spectrum(picture), seen.masks(kernel)).real)

    for name in ("input_amplitude_bits", "input_phase_bits", "mask_amplitude_bits", "mask_phase_bits"):
        errors = [error(**{name: bits}) for bits in (2, 4, 8, 16)]
        assert errors == sorted(errors, reverse=True), name
        assert errors[-1] < 2e-4 < errors[0], name
    assert error(mask_amplitude_bits=4, mask_norm="sum") > error(mask_amplitude_bits=4)
    assert error(mask="phase") > 0.1
    assert error(mask="amplitude") > 0.1


def test_pixels_with_an_area_have_an_envelope() -> None:
    point = torch.zeros(1, 32, 32)
    point[0, 0, 0] = 1.0
    small = correlator(mask_fill_factor=0.01)
    ones = torch.ones(1, 32, 32)
    for name in ("mask_fill_factor", "input_fill_factor"):
        seen = correlator(**{name: 1.0})
        field = seen.field(seen.spectrum(ones), seen.masks(point)).abs()[0]
        assert float(field.max()) == pytest.approx(1.0, rel=1e-4)
        if name == "mask_fill_factor":  # darker towards the edge of the camera: sinc(1/2) on each axis
            assert float(field[0, 16]) == pytest.approx(2 / math.pi, rel=1e-4)
    assert float(small.field(small.spectrum(ones), small.masks(point)).abs().min()) > 0.98
    # An alternating input is at the highest frequency, where a full pixel has lost a third of it.
    stripes = (torch.arange(32) % 2 * 2.0 - 1).expand(1, 32, 32)
    seen = correlator(input_fill_factor=1.0)
    field = seen.field(seen.spectrum(stripes), seen.masks(point)).abs()
    assert float(field.mean()) == pytest.approx(2 / math.pi, rel=1e-3)


def test_an_exposure_above_full_scale_saturates_and_one_below_wastes_levels() -> None:
    amplitude = torch.linspace(0, 1, 1001)[None]
    over = correlator(sign="reference", exposure=4.0, adc_bits=16).detect(amplitude**2)
    assert float(over.max()) == pytest.approx(0.5, rel=1e-3)
    under = correlator(sign="reference", exposure=0.01, adc_bits=8).detect(amplitude**2)
    fair = correlator(sign="reference", adc_bits=8).detect(amplitude**2)
    assert distance(amplitude, under) > 3 * distance(amplitude, fair)


def test_a_drifting_laser_scales_whole_frames() -> None:
    intensity = torch.full((200, 50), 0.5)
    intensity[:, 0] = 1.0
    seen = correlator(sign="reference", laser_drift=0.02, exposure=0.5).detect(intensity)
    each = seen[:, 1:] / seen[:, 1:].mean()
    assert float(each.std(1).max()) < 1e-5, "the same within a frame"
    assert float(each.mean(1).std()) == pytest.approx(0.01, rel=0.15), "half of the power's drift in amplitude"


def test_what_is_random_is_seeded() -> None:
    intensity = torch.rand(1, 1000, generator=torch.Generator().manual_seed(0))
    noisy = {"sign": "reference", "full_well_e": 1e3, "read_noise_e": 2.0, "laser_drift": 0.01}
    first, again, other = (correlator(seed=seed, **noisy).detect(intensity) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("sign", ["reference", "offset", "kernel_split", "full_split"])
def test_gradients_pass_straight_through(sign: str) -> None:
    generator = torch.Generator().manual_seed(0)
    work = Workload("w", 3, 1, 2, 4, (6, 6), (3, 3), (2, 2), (4, 4))
    x = torch.randn(3, 1, 2, 6, 6, generator=generator, requires_grad=True)
    kernels = torch.randn(1, 4, 2, 3, 3, generator=generator, requires_grad=True)
    optics = Optics(rows=64, cols=64, frame_rate_hz=1.0)
    direct(x, kernels, work).square().sum().backward()
    assert x.grad is not None
    assert kernels.grad is not None
    wanted = x.grad.clone(), kernels.grad.clone()
    gentle = {"full_well_e": 1e8, "read_noise_e": 1.0, "adc_bits": 16}
    levels = {f"{plane}_{kind}_bits": 12 for plane in ("input", "mask") for kind in ("amplitude", "phase")}
    for effects in (Effects(sign=sign), Effects(sign=sign, **gentle), Effects(sign=sign, **levels)):
        x.grad = kernels.grad = None
        Convolver(kernels, work, optics, effects)(x).square().sum().backward()
        assert distance(wanted[0], x.grad) < 0.05
        assert distance(wanted[1], kernels.grad) < 0.05
