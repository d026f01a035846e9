"""The main job on nothing but this machine: a gateway, a volume, a guest whose disk it is, and fio with
verification."""
