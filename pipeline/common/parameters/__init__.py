"""params.yaml: one module a section, so that a new parameter reruns only the stages that read its section."""
