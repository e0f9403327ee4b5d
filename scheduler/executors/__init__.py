"""The engines that run a plan, found by module name: each module here has ``run(running: Running) -> Report``.

All drive the same state machine (`scheduler.state`) and pass the same test kit. To add one, add a module; nothing else.
"""
