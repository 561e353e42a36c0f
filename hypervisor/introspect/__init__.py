"""Commands into containers in VMs: the kubelet routes over TCP on one side, the agent over vsock on the other."""
