"""From checkpoint to robot: export, the torch-free runtime, the control loop, the policy server and its client.

Importing this subpackage imports neither torch nor a simulator; `runtime`, `control` and `client` never do.
"""
