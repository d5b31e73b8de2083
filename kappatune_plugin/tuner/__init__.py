"""The PEFT method, laid out as those in peft/tuners: `config`, `model`, `layer`, `register`.

A model and a KappaTuneConfig go in, a PeftModel comes out whose selected weight matrices are trained in place.
`what_to_train` decides which, `trainer_hooks` follows the optimizer, `adapter_folder` and `saved_selection` know what
lies on disk.
"""

# first, since the method is registered as soon as PEFT is imported, which needs this room's modules
import peft  # noqa: F401
