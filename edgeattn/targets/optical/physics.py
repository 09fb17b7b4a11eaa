"""The 4f correlator: input plane, lens, mask, lens, camera.

At critical sampling (columns * pitch^2 = wavelength * focal length) a lens between two planes is a centred discrete
Fourier transform, so the whole path is two of them with the mask between: the field on the camera is the circular
convolution of the input with the kernel whose transform the mask is, turned by 180 degrees, which the electronics turn
back as they read it. Everything here keeps gradients; what rounds or is random passes them straight through.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from edgeattn.device import Effects
from edgeattn.targets.optical.schedule import Pair

#: A reference beam over the strongest field of a frame: no sum of both is dark, where roots tell nothing.
REFERENCE = 1.1
#: Intensities below this share of full scale have a square root whose gradient is taken as zero.
_DARK = 1e-12


def straight_through(value: Tensor, changed: Tensor) -> Tensor:
    """``changed``, with the gradient of ``value``."""
    return value + (changed - value).detach()


def rounded(value: Tensor, bits: int | None) -> Tensor:
    """Values of 0 to 1 in ``2**bits`` even levels; as they are without ``bits``."""
    if bits is None:
        return value
    steps = 2**bits - 1
    return straight_through(value, torch.round(value.clamp(0, 1) * steps) / steps)


def ideal_spectrum(planes: Tensor, period: Pair) -> Tensor:
    """Transforms (..., L1, L2 // 2 + 1) of real planes (..., H, W), filled with zeros to the period (L1, L2)."""
    spectrum: Tensor = torch.fft.rfft2(planes, s=period)
    return spectrum


def ideal_field(spectrum: Tensor, mask: Tensor, period: Pair) -> Tensor:
    """Real fields (..., L1, L2) of inputs behind a mask, both given as ``ideal_spectrum``: the second transform."""
    field: Tensor = torch.fft.irfft2(spectrum * mask, s=period)
    return field


class Correlator:
    """The planes with the switches of ``Effects``.

    Args:
        plane: pixels (down, right) over which the light is spread. A period smaller than the device's plane gives the
            same numbers as long as no effect depends on the place, see ``Effects.of_plane``.
        generator: of what is random.
    """

    def __init__(self, effects: Effects, plane: Pair, generator: torch.Generator) -> None:
        self.effects = effects
        self.plane = plane
        self._generator = generator

    def masks(self, kernels: Tensor) -> Tensor:
        """Complex masks (F, L1, L2) that modulators can show, of kernel planes (F, L1, L2).

        They are scaled back to the kernels' own size: the scale is known, and electronics undo it.
        """
        effects = self.effects
        full = torch.fft.fft2(kernels)
        amplitude = full.abs()
        peak = amplitude.amax((-2, -1), keepdim=True)
        scale = peak if effects.mask_norm == "peak" else kernels.abs().sum((-2, -1), keepdim=True)
        scale = scale.clamp_min(torch.finfo(scale.dtype).tiny)
        shown = rounded(amplitude / scale, effects.mask_amplitude_bits) * scale
        phase = full / amplitude.clamp_min(torch.finfo(amplitude.dtype).tiny)
        if effects.mask == "phase":
            # Light that nothing attenuates: as strong as the mask is on average, which is all that can be known of it.
            shown = amplitude.square().mean((-2, -1), keepdim=True).sqrt().expand_as(amplitude)
        if effects.mask == "amplitude":
            phase = torch.ones_like(phase)
        if effects.mask_phase_bits is not None:
            phase = _rounded_phase(phase, effects.mask_phase_bits)
        return self._misaligned(shown * phase)

    def _misaligned(self, masks: Tensor) -> Tensor:
        """Masks that are shifted and out of focus, behind an input of pixels with a size.

        A mask that is shifted by d pixels multiplies the kernel by exp(2 pi i d j / L) over its coordinate j.
        """
        effects = self.effects
        down, right = (torch.fft.fftfreq(size, dtype=torch.float64) for size in self.plane)
        if effects.mask_shift_px is not None:
            ramps = [
                torch.exp(2j * math.pi * shift * torch.arange(size, dtype=torch.float64) / size).to(masks.dtype)
                for shift, size in zip(effects.mask_shift_px, self.plane, strict=True)
            ]
            masks = torch.fft.fft2(torch.fft.ifft2(masks) * (ramps[0][:, None] * ramps[1]))
        if effects.defocus_waves is not None:
            radius = (2 * down[:, None]) ** 2 + (2 * right) ** 2  # 1 at the nearest edge of the mask
            masks = masks * torch.exp(2j * math.pi * effects.defocus_waves * radius).to(masks.dtype)
        if effects.input_fill_factor is not None:
            side = math.sqrt(effects.input_fill_factor)
            masks = masks * (torch.sinc(side * down)[:, None] * torch.sinc(side * right)).to(masks.dtype)
        return masks

    def inputs(self, planes: Tensor) -> Tensor:
        """Input planes (F, H, W) as their modulator shows them.

        Amplitudes are in levels. A sign is a phase of 0 or pi, which any number of phase levels has; with them the
        modulator evens itself out as well, and what is left is an error of its own in each pixel.
        """
        effects = self.effects
        if effects.input_amplitude_bits is not None:
            peak = planes.detach().abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(planes.dtype).tiny)
            size = rounded(planes.detach().abs() / peak, effects.input_amplitude_bits) * peak
            planes = straight_through(planes, size * planes.detach().sign())
        if effects.input_phase_bits is not None:
            planes = planes * _unevenness(effects, planes.shape[-2:])
        return planes

    def spectrum(self, planes: Tensor) -> Tensor:
        """The field (F, L1, L2) before the mask, of real inputs (F, H, W)."""
        spectrum: Tensor = torch.fft.fft2(self.inputs(planes), s=self.plane)
        return spectrum

    def field(self, spectrum: Tensor, mask: Tensor) -> Tensor:
        """Complex fields (F, L1, L2) on the camera."""
        field: Tensor = torch.fft.ifft2(spectrum * mask)
        if self.effects.mask_fill_factor is not None:
            side = math.sqrt(self.effects.mask_fill_factor)
            down, right = (torch.fft.fftshift(torch.fft.fftfreq(size, dtype=field.real.dtype)) for size in self.plane)
            field = field * (torch.sinc(side * down)[:, None] * torch.sinc(side * right))
        return field

    def read(self, field: Tensor, pick: Callable[[Tensor], Tensor]) -> Tensor:
        """The wanted values of fields (F, ...), as electronics have them after the camera.

        Args:
            pick: takes them (F, ...) out of what the camera sees.
        """
        effects = self.effects
        real = field.real if field.is_complex() else field
        if effects.sign == "field":
            return pick(self.moved(real))
        reference: Tensor = torch.zeros(len(field))
        if effects.sign == "reference":
            reference = REFERENCE * pick(real.detach()).abs().flatten(1).amax(1)

        def intensity(seen: Tensor) -> Tensor:
            beam = reference.reshape(-1, *[1] * (seen.ndim - 1))
            if not seen.is_complex():
                return (seen + beam).square()
            return (seen.real + beam).square() + seen.imag.square()

        if effects.camera_shift_px is None and effects.rotation_deg is None:
            amplitude = self.detect(intensity(pick(field)))
        else:
            amplitude = self.detect(pick(self.moved(intensity(field))))
        return amplitude - reference.reshape(-1, *[1] * (amplitude.ndim - 1))

    def moved(self, image: Tensor) -> Tensor:
        """What a shifted, rotated camera sees of an intensity (F, L1, L2): pixels between others are interpolated."""
        effects = self.effects
        if effects.camera_shift_px is None and effects.rotation_deg is None:
            return image
        shift = effects.camera_shift_px or (0.0, 0.0)
        angle = math.radians(effects.rotation_deg or 0.0)
        height, width = image.shape[-2:]
        middle = (height - 1) / 2, (width - 1) / 2
        y = torch.arange(height, dtype=image.dtype)[:, None] - middle[0]
        x = torch.arange(width, dtype=image.dtype) - middle[1]
        rows = math.cos(angle) * y - math.sin(angle) * x + middle[0] + shift[0]
        cols = math.sin(angle) * y + math.cos(angle) * x + middle[1] + shift[1]
        grid = torch.stack([2 * cols / max(width - 1, 1) - 1, 2 * rows / max(height - 1, 1) - 1], -1)
        grid = grid.expand(len(image), -1, -1, -1)
        sampled = torch.nn.functional.grid_sample(image[:, None], grid, align_corners=True, padding_mode="zeros")
        return sampled[:, 0]

    def detect(self, intensity: Tensor) -> Tensor:
        """Amplitudes that electronics make of the intensities of the wanted pixels (F, ...), frame by frame.

        The exposure is set so that the brightest of a frame is at ``exposure`` of full scale. Electrons are counted
        with the noise of their number and of the read-out, digitized, and the square root taken.
        """
        effects = self.effects
        full = intensity.detach().flatten(1).amax(1).clamp_min(torch.finfo(intensity.dtype).tiny)
        full = full.reshape(-1, *[1] * (intensity.ndim - 1))
        if not effects.detects and effects.exposure == 1.0:
            return _root(intensity, full)
        full = full / effects.exposure
        level = intensity / full
        if effects.laser_drift:
            power = 1 + effects.laser_drift * torch.randn(full.shape, generator=self._generator, dtype=level.dtype)
            level = level * power.clamp_min(0)
        level = level.clamp(0, 1)
        if effects.full_well_e is not None:
            electrons = torch.poisson(level.detach() * effects.full_well_e, generator=self._generator)
            if effects.read_noise_e:
                noise = torch.randn(level.shape, generator=self._generator, dtype=level.dtype)
                electrons = electrons + effects.read_noise_e * noise
            level = straight_through(level, electrons / effects.full_well_e)
        level = rounded(level, effects.adc_bits)
        return _root(level, torch.ones_like(full)) * full.sqrt()


def _unevenness(effects: Effects, shape: tuple[int, ...]) -> Tensor:
    """Unit phasors (H, W): the phase that is left of each pixel's own, up to half a level, always the same."""
    assert effects.input_phase_bits is not None
    generator = torch.Generator().manual_seed(effects.seed)
    left = torch.rand(shape, generator=generator) - 0.5
    return torch.polar(torch.ones(shape), left * (2 * math.pi / 2**effects.input_phase_bits))


def _rounded_phase(phase: Tensor, bits: int) -> Tensor:
    """Unit phasors at the nearest of ``2**bits`` even angles."""
    step = 2 * math.pi / 2**bits
    angle = torch.round(phase.detach().angle() / step) * step
    return straight_through(phase, torch.polar(torch.ones_like(angle), angle))


def _root(intensity: Tensor, full: Tensor) -> Tensor:
    """The square root, without the infinite gradient at zero."""
    dark = intensity <= full * _DARK
    return torch.where(dark, intensity.detach().clamp_min(0).sqrt(), torch.where(dark, full, intensity).sqrt())
