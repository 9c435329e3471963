"""Floor 4: questions put to a trained model or an energy: how likely is this, what lies behind it, how large is Z?"""

from undiffuse.inference.dequantisation import VariationalDequantiser, dequantise
from undiffuse.inference.editing import colourise, inpaint, super_resolve
from undiffuse.inference.encoding import decode, encode, interpolate
from undiffuse.inference.energies import NearestClass, denoise, out_of_distribution
from undiffuse.inference.known import BlockMeans, ChannelMix, Entries, Imputation, Known
from undiffuse.inference.likelihood import Exact, Hutchinson, HutchPP, Likelihood, bits_per_dim, log_likelihood
from undiffuse.inference.partition import (
    Bracket,
    LogPartition,
    annealed_importance_sampling,
    bracket_log_z,
    reverse_annealed_importance_sampling,
)

__all__ = [
    "BlockMeans",
    "Bracket",
    "ChannelMix",
    "Entries",
    "Exact",
    "HutchPP",
    "Hutchinson",
    "Imputation",
    "Known",
    "Likelihood",
    "LogPartition",
    "NearestClass",
    "VariationalDequantiser",
    "annealed_importance_sampling",
    "bits_per_dim",
    "bracket_log_z",
    "colourise",
    "decode",
    "denoise",
    "dequantise",
    "encode",
    "inpaint",
    "interpolate",
    "log_likelihood",
    "out_of_distribution",
    "reverse_annealed_importance_sampling",
    "super_resolve",
]
