"""Plain English for the tokenizer, so that texts other than captions become few and different tokens."""

from __future__ import annotations

_ADJECTIVES = """
big small little large tiny huge tall short long wide narrow old young new happy sad angry smiling
grinning laughing crying sleeping winking frowning surprised worried tired sick cold hot warm bright
dark light heavy soft hard sharp round square flat empty full open closed broken clean dirty wet dry
fast slow quiet loud beautiful ugly cute funny scary wild tame fresh rotten ripe sweet sour wooden
metal golden silver glass paper plastic stone leather cotton red orange yellow green cyan blue
purple pink brown black white gray grey colorful striped spotted shiny dull abstract modern ancient
medieval futuristic realistic detailed blurry vintage rising setting crescent waving raised pointing
folded crossed clenched floating flying running walking jumping dancing swimming riding driving
""".split()  # noqa: SIM905
_NOUNS = """
face eyes mouth nose ear hand hands finger thumb arm leg foot heart tongue teeth hair beard head
person people man woman boy girl baby child adult family couple king queen prince princess doctor
nurse teacher student farmer cook worker scientist artist pilot astronaut firefighter police officer
guard detective judge singer dancer runner dog cat horse cow pig sheep goat rabbit mouse rat hamster
squirrel fox bear panda koala tiger lion monkey gorilla elephant camel giraffe zebra deer wolf bat
bird chicken duck eagle owl penguin parrot swan turkey dove fish whale dolphin shark octopus crab
lobster shrimp snail bug bee ant beetle butterfly spider scorpion snake turtle lizard dragon
dinosaur unicorn robot alien ghost monster skull tree flower rose tulip leaf plant cactus mushroom
grass apple banana orange lemon melon grapes strawberry cherry peach pear pineapple tomato potato
carrot corn pepper bread cheese egg meat pizza burger fries sandwich rice noodles soup salad cake
cookie chocolate candy ice cream coffee tea milk beer wine bottle glass cup plate fork knife spoon
bowl table chair bed door window house building castle church hospital school bank hotel store
factory tower bridge road street city town beach island mountain river lake sea ocean desert forest
field garden park sky sun moon star cloud rain snow wind storm lightning fire water wave rainbow
night day morning evening sunset sunrise car bus truck train taxi bicycle motorcycle boat ship
airplane plane rocket helicopter balloon ball football basketball tennis baseball hockey golf skis
medal trophy guitar piano violin drum trumpet music note phone computer keyboard screen camera
television radio clock watch lamp candle book newspaper letter envelope package box bag hat crown
shirt dress shoe boot glove scarf coat ring gem money coin card key lock hammer axe pick wrench saw
gun bomb shield sword bow arrow flag map compass sign button symbol circle square triangle diamond
cross line corner wall floor background painting photo picture drawing sketch portrait landscape
style world earth globe thing place front back side top bottom left right
""".split()  # noqa: SIM905
_OTHER = """
a an the and or not with without of in on at to from by for over under above below between behind
inside outside near next into through around up down one two three four five six seven eight nine
ten many several few some all each is are was be being has have had do does made that this these
those it its his her their who which what where when while as like than very more most less least
only also no yes there here
""".split()  # noqa: SIM905

# Short made-up sentences: every word above, in the places where prompts have it.
SENTENCES: list[str] = [
    *(
        f"a {word} {_NOUNS[(7 * i) % len(_NOUNS)]} with {_NOUNS[(11 * i + 3) % len(_NOUNS)]}"
        for i, word in enumerate(_ADJECTIVES)
    ),
    *(f"{noun} and the {_ADJECTIVES[(5 * i) % len(_ADJECTIVES)]} {noun}" for i, noun in enumerate(_NOUNS)),
    *(f"{word} photo {word}" for word in _OTHER),
]
