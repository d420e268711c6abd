"""Keep the earlier address of `ser.scores.card`."""

from ser.scores.card import write_card as write_card
