"""The closed English vocabulary that the English categories draw from."""

from __future__ import annotations


def split_words(text: str) -> tuple[str, ...]:
    """Read a word list that is kept as running text."""
    return tuple(text.split())


NAMES = split_words(
    """
    Ada Adam Agnes Aisha Alan Albert Alice Amir Amy Anders Andrea Anna Anton Arthur Astrid Aurora
    Barbara Beatrix Ben Bianca Boris Bruno Camille Carla Carlos Carmen Cecilia Chen Clara Claudia
    Conrad Cora Cyril Daisy Daniel Daria David Diana Diego Dora Edgar Edith Elena Eli Elisa Emil
    Emma Eric Esther Eva Felix Fiona Flora Frank Freya Gabriel Gemma George Gloria Greta Gustav
    Hana Hannah Harold Hassan Hector Heidi Helen Henry Hugo Ian Ida Igor Ines Ingrid Irene Isaac
    Ivan Jack Jana Jasper Joan Jonas Judith Julia Karim Karl Kate Kenji Kira Klaus Lara Laura Lea
    Leila Leo Lena Lily Linda Louis Lucia Lukas Luna Marco Maria Marta Martin Matteo Maya Mei
    Milan Mina Mira Mona Nadia Naomi Nina Noah Nora Olga Oliver Omar Oscar Otto Pablo Paula Pedro
    Peter Petra Philip Priya Quentin Rachel Ralph Rita Robert Rosa Ruben Ruth Samir Sandra Sara
    Silvia Simon Sofia Stella Sven Tanya Tara Thomas Tina Tomas Ursula Vera Victor Viola Walter
    Wanda Wei William Xenia Yara Yusuf Zara Zoe
    """
)

ITEMS = split_words(
    """
    anchor basket bell blanket book bottle bowl box brush bucket cabinet candle carpet chair clock
    coat compass cup curtain desk door drum fence flag flute glove guitar hammer hat jar kettle
    key knife ladder lamp letter mirror needle notebook oven painting pencil pillow plate radio
    ring rope saddle shelf shovel stove table tent towel vase violin wagon wheel window
    """
)

ADJECTIVES = split_words(
    """
    ancient blue bright broad broken brown clean cold curious dark dry dusty empty famous fine
    gentle golden green grey heavy hidden hollow large lonely long loose low narrow neat new old
    pale plain polished quiet red round rusty sharp short simple slow small smooth soft solid
    square strange strong tall thin tiny warm wet white wide wild wooden yellow
    """
)

PEOPLE = split_words(
    """
    baker carpenter cook dancer doctor driver farmer fisherman gardener guard guest hunter judge
    lawyer miller miner musician nurse painter pilot poet porter sailor scholar shepherd singer
    smith soldier student tailor teacher traveller waiter weaver writer
    """
)

PAST_VERBS = split_words(
    """
    admired bought borrowed carried cleaned covered described dragged found hid lifted lost
    measured moved noticed opened packed painted polished praised pulled pushed remembered
    repaired returned sold studied touched wanted washed watched
    """
)

PLACES = split_words(
    """
    bakery barn beach bridge castle cave cellar church corner factory farm field forest fountain
    garden gate harbour hill hotel house island kitchen lake library market meadow mill mountain
    museum orchard palace park path river road school square stable station street theatre tower
    valley village wall well workshop yard
    """
)

PREPOSITIONS = ("above", "behind", "below", "beside", "near", "past", "towards", "under")

TIMES = (
    "In the morning",
    "In the evening",
    "At noon",
    "At night",
    "After the rain",
    "Before the storm",
    "In early spring",
    "In late summer",
    "In the autumn",
    "In the winter",
    "On market day",
    "On the first day",
    "On the last day",
    "A week later",
    "Many years ago",
    "Not long ago",
    "Some days later",
    "Every now and then",
    "Once again",
    "As always",
)

CITIES = split_words(
    """
    Athens Bergen Berlin Bern Boston Cairo Chicago Dakar Delhi Denver Dublin Florence Geneva
    Hamburg Havana Helsinki Istanbul Kyoto Lagos Lima Lisbon London Lyon Madrid Manila Milan
    Montreal Munich Nairobi Naples Osaka Oslo Paris Prague Quito Riga Rome Seoul Sydney Tokyo
    Toronto Turin Venice Vienna Warsaw Zurich
    """
)

COLOURS = split_words("black blue brown gold green grey orange pink purple red silver white yellow")

FRUITS = split_words(
    """
    apple apricot banana cherry date fig grape lemon lime mango melon olive orange papaya peach
    pear plum raspberry strawberry
    """
)

PETS = split_words("cat dog duck fish goat goose hamster horse mouse parrot pony rabbit turtle")

DAYS = split_words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")

SPORTS = split_words(
    """
    archery badminton baseball boxing chess cricket cycling fencing football golf hockey judo
    rowing rugby running sailing skating skiing swimming tennis volleyball wrestling
    """
)
