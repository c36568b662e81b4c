"""KV-cache compression for ESPnet speech recognition.

Importing the package makes its encoders known to ESPnet (see `espnet_kv.registration`).
The import itself is light: ESPnet is not loaded until somebody asks for it.
"""

from espnet_kv.registration import register

__version__ = "0.1.0"

register()
