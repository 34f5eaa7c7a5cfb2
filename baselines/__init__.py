"""The rivals of SBR. A new defence is a file beside this one and a line in the list below."""

from baselines.booster import BOOSTER
from baselines.deepalign import DEEPALIGN
from baselines.ewc import EWC
from baselines.lisa import LISA
from baselines.t_vaccine import T_VACCINE
from baselines.vaccine import VACCINE

RIVALS = [
    LISA,
    EWC,
    DEEPALIGN,
    VACCINE,
    T_VACCINE,
    BOOSTER,
]
