# SPDX-License-Identifier: Apache-2.0
"""From text to tokens: the sources of calibration and evaluation text, and the windows cut from it.

May import storage (for paths) and errors. Read ``text.py`` first, then ``windows.py``. ``bos.py`` says
where windows begin with BOS, ``rows.py`` reads local files, ``hub.py`` reads data sets through ``datasets``, and
``generated.py`` draws text from a model.
"""

from omniq.data.bos import Bos
from omniq.data.generated import SelfGenerated
from omniq.data.text import HubText, LocalText, Stdlib, TextSource
from omniq.data.windows import Calibration, Evaluation, Windows, digest

__all__ = [
    "Bos",
    "Calibration",
    "Evaluation",
    "HubText",
    "LocalText",
    "SelfGenerated",
    "Stdlib",
    "TextSource",
    "Windows",
    "digest",
]
