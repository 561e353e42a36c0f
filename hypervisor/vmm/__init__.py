"""Virtual machines: config, launch plan, argv, running VM; QMP, confinement, accelerator. Knows no pods."""
