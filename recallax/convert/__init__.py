"""Import and export of weights: layouts of other projects, runs, and StableHLO programs.

`import_model` and `import_config` read another project's checkpoint; `export_config` and `export_weights` write one.
`import_run` and `export_run` do the same with folders of runs. `export_programs` compiles a run's model, and
`load_programs` loads it without the code of the model.
"""

from recallax.convert.layouts import LAYOUTS, CheckpointLayout, layout_of
from recallax.convert.model_export import export_config, export_weights
from recallax.convert.model_import import import_config, import_model, import_parameters
from recallax.convert.run_export import ExportDtype, ExportFormat, export_run
from recallax.convert.run_import import import_run
from recallax.convert.run_weights import RunState, RunWeights, read_run_state, read_run_weights
from recallax.convert.safetensors_file import read_safetensors, write_safetensors
from recallax.convert.stablehlo import ExportedPrograms, export_programs, load_programs
from recallax.convert.weights_error import WeightsError
from recallax.convert.weights_folder import read_weights, write_weights

__all__ = [
    "LAYOUTS",
    "CheckpointLayout",
    "ExportDtype",
    "ExportFormat",
    "ExportedPrograms",
    "RunState",
    "RunWeights",
    "WeightsError",
    "export_config",
    "export_programs",
    "export_run",
    "export_weights",
    "import_config",
    "import_model",
    "import_parameters",
    "import_run",
    "layout_of",
    "load_programs",
    "read_run_state",
    "read_run_weights",
    "read_safetensors",
    "read_weights",
    "write_safetensors",
    "write_weights",
]
