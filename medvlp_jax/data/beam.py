"""Prepare a corpus that outgrows one machine: the same builders on Apache Beam, any runner.

  medvlp data prepare NAME --manual-dir DIR --data-dir DIR --beam-runner DirectRunner
      --beam-options=--direct_num_workers=8,--direct_running_mode=multi_processing

The tables are read here, to refuse their defects before anything is started, and once more by each
worker, so that what travels are row numbers and no closures; images are read by the workers alone.
Records and shards are those of a preparation without Beam. Source and data folder must be seen by
all workers. Needs the extra `beam`, in an environment of its own: its pins differ from the rest's.
"""

from collections.abc import Sequence
from pathlib import Path

import tensorflow_datasets as tfds

from medvlp_jax.config import UserError, nearest

ROWS = 64  # of a unit of work


def load():
    """Import Apache Beam.

    Raises:
      UserError: where it is not installed.
    """
    try:
        import apache_beam
    except ImportError as error:
        raise UserError(
            "--beam-runner needs Apache Beam: pip install 'medvlp-jax[beam]' in an environment of "
            "its own."
        ) from error
    return apache_beam


def download_config(runner: str, options: Sequence[str], **fields) -> tfds.download.DownloadConfig:
    """Return what tells TFDS to run on Beam.

    Args:
      runner: name of a runner, such as "DirectRunner" or "FlinkRunner", or module.Class.
      options: its flags, "--direct_num_workers=8".
      **fields: the other fields.

    Raises:
      UserError: for an unknown runner, or without Beam.
    """
    beam = load()
    from apache_beam.options import pipeline_options

    known = pipeline_options.StandardOptions.KNOWN_RUNNER_NAMES
    if "." not in runner and runner not in known:
        raise UserError(f"No Beam runner '{runner}'. {nearest(runner, known)}")
    try:
        made = beam.runners.create_runner(runner)
    except ImportError as error:  # an extra of Beam, such as gcp
        raise UserError(f"The Beam runner {runner} is not installed: {error}.") from error
    return tfds.download.DownloadConfig(
        beam_runner=made,
        beam_options=pipeline_options.PipelineOptions(list(options)),
        **fields,
    )


def examples(builder, folder: Path, split: str, count: int):
    """Return the transform that makes (image id, record) of every sample of a split.

    Args:
      builder: a `building.Builder`.
      folder: the source's own files.
      split: whose samples.
      count: how many there are.
    """
    beam = load()

    class Read(beam.DoFn):
        """Rows [first, last) -> records."""

        def __init__(self):
            self.builder = builder

        def setup(self):
            samples = self.builder.kept(folder)
            self.samples = [sample for sample in samples if sample.split == split]

        def process(self, rows):
            for sample in self.samples[slice(*rows)]:
                yield sample.image_id, self.builder.to_record(sample)

    blocks = [(first, min(first + ROWS, count)) for first in range(0, count, ROWS)]
    return beam.Create(blocks) | beam.Reshuffle() | beam.ParDo(Read())
