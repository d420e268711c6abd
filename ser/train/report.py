"""Keep the earlier address of `ser.scores.report`."""

from ser.scores.report import Outcomes as Outcomes
