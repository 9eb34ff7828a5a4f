"""What the embedded checkpoint can draw: concepts, background colours and the captions that name
them.
"""

import numpy as np

_TABLE = """
    cat 🐱 | dog 🐶 | fox 🦊 | bear 🐻 | panda 🐼 | koala 🐨 | tiger 🐯 | lion 🦁 | cow 🐮 | pig 🐷 | frog 🐸 |
    monkey 🐵 | mouse 🐭 | rabbit 🐰 | wolf 🐺 | horse 🐴 | unicorn 🦄 | raccoon 🦝 | chicken 🐔 | chick 🐤 |
    penguin 🐧 | owl 🦉 | duck 🦆 | parrot 🦜 | flamingo 🦩 | peacock 🦚 | bat 🦇 | turtle 🐢 | snake 🐍 |
    crocodile 🐊 | dinosaur 🦕 | whale 🐳 | dolphin 🐬 | shark 🦈 | tropical fish 🐠 | octopus 🐙 | crab 🦀 |
    lobster 🦞 | snail 🐌 | butterfly 🦋 | bee 🐝 | ladybug 🐞 | spider 🕷 | elephant 🐘 | giraffe 🦒 | zebra 🦓 |
    gorilla 🦍 | sheep 🐑 | hedgehog 🦔 | paw print 🐾
    sunflower 🌻 | rose 🌹 | tulip 🌷 | cherry blossom 🌸 | hibiscus 🌺 | daisy 🌼 | cactus 🌵 | palm tree 🌴 |
    tree 🌳 | clover 🍀 | maple leaf 🍁 | mushroom 🍄 | seedling 🌱
    apple 🍎 | green apple 🍏 | pear 🍐 | tangerine 🍊 | lemon 🍋 | banana 🍌 | watermelon 🍉 | grapes 🍇 |
    strawberry 🍓 | cherry 🍒 | peach 🍑 | pineapple 🍍 | coconut 🥥 | tomato 🍅 | avocado 🥑 | eggplant 🍆 |
    carrot 🥕 | corn 🌽 | chili pepper 🌶 | broccoli 🥦
    bread 🍞 | croissant 🥐 | pretzel 🥨 | cheese 🧀 | drumstick 🍗 | steak 🥩 | hamburger 🍔 | french fries 🍟 |
    pizza 🍕 | hot dog 🌭 | taco 🌮 | fried egg 🍳 | popcorn 🍿 | sushi 🍣 | ice cream 🍦 | doughnut 🍩 |
    cookie 🍪 | birthday cake 🎂 | shortcake 🍰 | cupcake 🧁 | chocolate bar 🍫 | candy 🍬 | lollipop 🍭 |
    honey pot 🍯 | custard 🍮 | wine glass 🍷 | beer 🍺 | coffee ☕ | juice box 🧃
    sun ☀ | moon 🌕 | crescent moon 🌙 | star ⭐ | rainbow 🌈 | umbrella ☂ | snowman ⛄ | fire 🔥 |
    water drop 💧 | wave 🌊 | lightning ⚡ | earth 🌍 | volcano 🌋
    house 🏠 | castle 🏰 | tent ⛺ | tower 🗼
    car 🚗 | taxi 🚕 | bus 🚌 | police car 🚓 | truck 🚚 | tractor 🚜 | race car 🏎 | motorcycle 🏍 | scooter 🛵 |
    train 🚆 | airplane ✈ | helicopter 🚁 | rocket 🚀 | flying saucer 🛸 | sailboat ⛵ | ship 🚢 | anchor ⚓ |
    traffic light 🚦 | stop sign 🛑
    alarm clock ⏰ | hourglass ⏳ | telephone ☎ | mobile phone 📱 | laptop 💻 | camera 📷 | television 📺 |
    light bulb 💡 | red lantern 🏮 | book 📕 | mailbox 📫 | package 📦 | pencil ✏ | scissors ✂ | pushpin 📌 |
    lock 🔒 | key 🔑 | hammer 🔨 | magnet 🧲 | bomb 💣 | crown 👑 | diamond 💎 | top hat 🎩 | sunglasses 🕶 |
    shirt 👕 | jeans 👖 | dress 👗 | kimono 👘 | sneaker 👟 | high heel 👠 | backpack 🎒 | handbag 👜 | purse 👛 |
    lipstick 💄 | money bag 💰 | dollar bill 💵 | trophy 🏆 | medal 🏅 | cap 🧢
    soccer ball ⚽ | basketball 🏀 | football 🏈 | billiard ball 🎱 | die 🎲 | dart board 🎯 | kite 🪁 |
    game controller 🎮 | joystick 🕹 | puzzle piece 🧩 | teddy bear 🧸 | guitar 🎸 | piano 🎹 | trumpet 🎺 |
    drum 🥁 | microphone 🎤 | headphones 🎧 | bell 🔔 | balloon 🎈 | gift 🎁 | christmas tree 🎄 | pumpkin 🎃
    pill 💊 | door 🚪 | couch 🛋 | brick 🧱 | fire extinguisher 🧯 | boxing glove 🥊 | yarn 🧶 | megaphone 📣 |
    battery 🔋 | ribbon 🎀
    smiley face 😀 | robot 🤖 | ghost 👻 | alien 👽 | skull 💀 | clown 🤡 | poop 💩 | space invader 👾 |
    santa claus 🎅 | devil 😈 | eye 👁 | mouth 👄 | brain 🧠 | thumbs up 👍
    red heart ❤ | yellow heart 💛 | green heart 💚 | blue heart 💙 | purple heart 💜 | black heart 🖤 |
    cross mark ❌ | check mark ✅ | warning sign ⚠ | no entry sign ⛔ | recycling symbol ♻ | yin yang ☯ |
    red triangle 🔺 | blue diamond 🔷 | green circle 🟢 | blue square 🟦 | yellow square 🟨 | musical note 🎵 |
    spade ♠ | checkered flag 🏁 | rainbow flag 🏳️‍🌈 | collision 💥 | question mark ❓
"""

CONCEPTS: dict[str, str] = {
    name.strip(): emoji
    for line in _TABLE.strip().splitlines()
    for name, emoji in (
        entry.strip().rsplit(" ", 1) for entry in line.strip().strip("|").split("|")
    )
}
"""Name to emoji. Every noun has exactly one picture, and no two pictures are near-duplicates."""

COLORS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "red": (222, 64, 72),
    "orange": (247, 150, 60),
    "yellow": (250, 226, 90),
    "green": (92, 178, 92),
    "turquoise": (92, 208, 204),
    "blue": (72, 112, 214),
    "purple": (146, 88, 190),
    "pink": (248, 168, 204),
    "gray": (136, 140, 146),
}
"""Background name to sRGB."""

TEMPLATES: tuple[tuple[str, float], ...] = (
    ("a photo of a {}", 0.45),
    ("a picture of a {}", 0.1),
    ("an image of a {}", 0.1),
    ("a drawing of a {}", 0.05),
    ("an emoji of a {}", 0.05),
    ("a {}", 0.1),
    ("{}", 0.15),
)
"""Caption template and how often it is used."""

EVALUATION_TEMPLATE = "a photo of a {}"
WHITE_SHARE_UNNAMED = 0.5
"""How often the background is white when the caption does not name it."""
NAMED_SHARE = 0.5
"""How often a caption names the background."""

_VOWELS = "aeiou"


def background_probabilities() -> tuple[np.ndarray, np.ndarray]:
    """Joint distribution of backgrounds and captions, seen from the background.

    Returns:
        The share of each background over all pictures, and the probability that the caption of a
        picture with that background names it. Both have shape ``(len(COLORS),)``.
    """
    n = len(COLORS)
    unnamed = np.full(n, (1 - WHITE_SHARE_UNNAMED) / (n - 1))
    unnamed[list(COLORS).index("white")] = WHITE_SHARE_UNNAMED
    unnamed *= 1 - NAMED_SHARE
    named = np.full(n, NAMED_SHARE / n)
    total = named + unnamed
    return total, named / total


def with_article(template: str, name: str, rng: np.random.Generator | None = None) -> str:
    """Fill a template; with a generator, "a" before a vowel becomes "an" half of the time.

    Both spellings are trained so that ``"a photo of a apple"`` and ``"a photo of an apple"`` mean
    the same.
    """
    if rng is not None and name[0] in _VOWELS and rng.random() < 0.5:
        template = template.replace("a {}", "an {}")
    return template.format(name)


def caption(concept: str, color: str | None, rng: np.random.Generator) -> str:
    """Draw a caption for a concept, naming the background if ``color`` is given."""
    weights = np.array([weight for _, weight in TEMPLATES])
    template = TEMPLATES[rng.choice(len(TEMPLATES), p=weights / weights.sum())][0]
    text = with_article(template, concept, rng)
    if color is not None:
        article = "an" if color[0] in _VOWELS else "a"
        text += f" on {article} {color} background"
    return text


def vocabulary_texts() -> list[str]:
    """Texts that together hold every word a caption can have."""
    colors = " ".join(f"on a {color} background on an {color} background" for color in COLORS)
    templates = " ".join(template.format("") for template, _ in TEMPLATES)
    return [*CONCEPTS, colors, templates]
