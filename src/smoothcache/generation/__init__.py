"""Generation at scale: many samples into a folder, over ranks, resumable."""

from .folder import DiskFullError as DiskFullError
from .from_pipeline import sample_pipeline as sample_pipeline
from .inputs import random_classes as random_classes
from .layouts import LAYOUTS as LAYOUTS
from .manifest import Manifest as Manifest
from .manifest import SampleFile as SampleFile
from .prompts import read_prompts as read_prompts
from .reading import SampleSet as SampleSet
from .reading import join_arrays as join_arrays
from .sample_many import sample_many as sample_many
