"""The VM's side of a volume: how QEMU and libvirt are told about it, and guests that the project boots
itself."""
