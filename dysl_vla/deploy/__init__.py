"""From checkpoint to robot: export, the torch-free runtime, the control loop, the policy server and its client.

Importing this room imports neither torch nor a simulator; `runtime`, `loop` and `client` never do.
"""
