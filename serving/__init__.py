"""Ray Serve application for one exported model: HTTP API and playground page."""

import os

# Serve's controller ends by killing itself, which Ray reports as a failure of it and of those who still listen to it.
# Ray reads the variable on import.
os.environ.setdefault(
    "RAY_DEDUP_LOGS_SKIP_REGEX",
    r"Task ServeController\.(graceful_shutdown|listen_for_change) failed",
)
# Proxies of Serve get the limit on bodies by this variable only; a local Ray cluster inherits it.
os.environ.setdefault(
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "serving.body_limit:create_proxy_middleware"
)
