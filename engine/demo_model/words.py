"""The words that the toy's questions and stories are made of."""

# ruff: noqa: SIM905  # word lists read best as text

ANIMALS = (
    "fox bear cat dog frog goat hen horse mouse rabbit sheep wolf duck lion pony turtle".split()
)
THINGS = (
    "lamp key boat drum hat bell book coin kite ladder map mirror ring rope shell basket".split()
)
PLACES = (
    "river forest garden castle cave hill lake market bridge tower village meadow harbor mill"
).split()
NAMES = "Anna Ben Clara Dan Emma Finn Greta Hugo Ida Jonas Lena Max Nina Otto Rosa Tom".split()
NOUNS = ANIMALS + THINGS + PLACES

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = (
    "January February March April May June July August September October November December"
).split()
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ORDINALS = ("first", "second", "third", "fourth")

OPPOSITES = (
    ("hot", "cold"), ("big", "small"), ("fast", "slow"), ("up", "down"), ("day", "night"),
    ("open", "closed"), ("happy", "sad"), ("old", "young"), ("high", "low"), ("wet", "dry"),
    ("light", "dark"), ("full", "empty"), ("hard", "soft"), ("early", "late"), ("left", "right"),
    ("near", "far"), ("rich", "poor"), ("strong", "weak"), ("loud", "quiet"), ("clean", "dirty"),
    ("long", "short"), ("win", "lose"), ("push", "pull"), ("first", "last"), ("true", "false"),
    ("thick", "thin"), ("sweet", "sour"), ("inside", "outside"), ("above", "below"),
    ("start", "end"),
)  # fmt: skip

LETTER_WORDS = (
    "ANT APE BAT BED BEE BOX BUS CAR CUP DAY EAR EGG EYE FAN FLY GUM HUT ICE INK JAM JAR LEG LOG "
    "MAN MUD NET NUT OAK OWL PAN PEN PIG PIN POT SEA SKY SUN TEA TOE TOY VAN WEB ZOO BABY BALL "
    "BARN BIRD BLUE BONE CAKE COAT CORN CRAB DEER DESK DOOR FARM FISH FIVE FOOD FOOT FORK GAME "
    "GOLD HAND HOME IRON JUMP KING LEAF LIME MILK MOON NEST NOSE PARK PEAR RAIN ROAD ROCK ROSE "
    "SALT SEED SHIP SNOW SOAP STAR TREE WIND WOOD APPLE BEACH BREAD BRUSH CHAIR CLOUD DANCE EARTH "
    "FLOOR GLASS GRAPE GREEN HEART HOUSE JUICE LEMON MUSIC NIGHT OCEAN PAPER PIANO PLANT QUEEN "
    "SHEET SHIRT SMILE SPOON STONE SUGAR TABLE TIGER TRAIN WATER WHEEL"
).split()
