"""An interpreter of ML programs: executes a saved .mlpackage on any machine.

``package`` reads the files, ``values`` decodes what they hold, ``program`` binds a function's operations to the
implementations in ``ops`` and runs them. What it checks is the converted graph and its weights; Apple's own kernels it
does not imitate.
"""
