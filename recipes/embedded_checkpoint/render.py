"""Emoji pictures: one clean cut-out per concept, and light random renderings of it on plain
backgrounds.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from recipes.embedded_checkpoint.concepts import COLORS, CONCEPTS, background_probabilities

FONT_PATHS = (
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/google-noto-emoji/NotoColorEmoji.ttf",
)
FONT_SIZE = 109
"""The one size the bitmap font has."""
IMAGE_SIZE = 64
CUTOUT_SIZE = 112
LARGEST_SUBJECT = 56
"""Longest side of a subject at scale 1, in pixels."""
SCALES = (0.88, 1.0)
SHIFT = 2.0
"""Largest shift from the centre along each axis, in pixels."""


def find_font(path: str | None = None) -> Path:
    """Locate Noto Color Emoji.

    Args:
        path: The font, or the folder ``png/128`` of the noto-emoji project: the pictures that the
            font is built from.

    Raises:
        FileNotFoundError: If the font is neither at ``path`` nor where Linux distributions put it.
    """
    candidates = [path] if path else list(FONT_PATHS)
    for candidate in candidates:
        if Path(candidate).is_file() or list(Path(candidate).glob("emoji_u*.png")):
            return Path(candidate)
    raise FileNotFoundError(
        f"Noto Color Emoji not found at {', '.join(candidates)}. Install it (Debian and Ubuntu: "
        "apt-get install fonts-noto-color-emoji) or name the file with --font."
    )


def drawn_from_font(font_path: Path, emoji: str) -> Image.Image:
    """The emoji as the font's bitmap, somewhere on a transparent canvas."""
    canvas = Image.new("RGBA", (300, 200), (0, 0, 0, 0))
    font = ImageFont.truetype(str(font_path), FONT_SIZE)
    ImageDraw.Draw(canvas).text((40, 30), emoji, font=font, embedded_color=True)
    return canvas


def drawn_from_folder(folder: Path, emoji: str) -> Image.Image:
    """The emoji's file in a folder of noto-emoji, whose names spell the code points without
    variation selectors.
    """
    codes = "_".join(f"{ord(character):04x}" for character in emoji if character != "\ufe0f")
    with Image.open(folder / f"emoji_u{codes}.png") as picture:
        return picture.convert("RGBA")


def cutouts(font_path: Path) -> list[Image.Image]:
    """Render every concept once, centred on a transparent square with premultiplied alpha ("RGBa").

    Premultiplied pixels resample without dark fringes.
    """
    draw_emoji = drawn_from_folder if font_path.is_dir() else drawn_from_font
    pictures = []
    for name, emoji in CONCEPTS.items():
        canvas = draw_emoji(font_path, emoji)
        box = canvas.getchannel("A").getbbox()
        if box is None or box[2] - box[0] > 160:
            raise ValueError(
                f"the font at {font_path} has no single picture for {name!r} ({emoji})"
            )
        glyph = canvas.crop(box)
        side = max(glyph.size)
        square = Image.new("RGBA", (side, side), (0, 0, 0, 0))
        square.paste(glyph, ((side - glyph.width) // 2, (side - glyph.height) // 2))
        pictures.append(
            square.convert("RGBa").resize((CUTOUT_SIZE, CUTOUT_SIZE), Image.Resampling.LANCZOS)
        )
    return pictures


def place(
    cutout: Image.Image, color: tuple[int, int, int], scale: float, dx: float, dy: float
) -> np.ndarray:
    """Composite a cut-out on a plain background.

    Args:
        cutout: Premultiplied square picture.
        color: Background, sRGB.
        scale: Relative size of the subject.
        dx: Shift to the right in pixels.
        dy: Shift down in pixels.

    Returns:
        Picture of shape ``(64, 64, 3)``, uint8.
    """
    side = LARGEST_SUBJECT * scale
    left, top = (IMAGE_SIZE - side) / 2 + dx, (IMAGE_SIZE - side) / 2 + dy
    width = round(side)
    small = cutout.resize((width, width), Image.Resampling.BOX, reducing_gap=None)
    layer = Image.new("RGBa", (IMAGE_SIZE, IMAGE_SIZE))
    layer.paste(small, (round(left), round(top)))
    rgba = np.asarray(layer, dtype=np.float32)
    alpha = rgba[..., 3:] / 255
    return np.clip(
        rgba[..., :3] + (1 - alpha) * np.array(color, dtype=np.float32) + 0.5, 0, 255
    ).astype(np.uint8)


def random_picture(
    cutout: Image.Image, color: tuple[int, int, int], rng: np.random.Generator
) -> np.ndarray:
    """Draw one rendering with a random size and shift."""
    scale = rng.uniform(*SCALES)
    dx, dy = rng.uniform(-SHIFT, SHIFT, size=2)
    return place(cutout, color, scale, dx, dy)


def dataset(font_path: Path, per_concept: int, seed: int) -> dict[str, np.ndarray]:
    """Render the training set.

    Returns:
        ``images`` (uint8, ``(n, 64, 64, 3)``), ``concept`` and ``color`` (indices, ``(n,)``),
        ordered by concept.
    """
    rng = np.random.default_rng(seed)
    palette = list(COLORS.values())
    shares, _ = background_probabilities()
    pictures = cutouts(font_path)
    n = len(pictures) * per_concept
    images = np.empty((n, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    concepts = np.repeat(np.arange(len(pictures)), per_concept)
    # The same number of each background for every concept, up to rounding, in random order.
    quantiles = (np.arange(per_concept) + 0.5) / per_concept
    block = np.searchsorted(np.cumsum(shares), quantiles).clip(max=len(palette) - 1)
    colors = np.concatenate([rng.permutation(block) for _ in pictures])
    for i in range(n):
        images[i] = random_picture(pictures[concepts[i]], palette[colors[i]], rng)
    return {"images": images, "concept": concepts, "color": colors}
