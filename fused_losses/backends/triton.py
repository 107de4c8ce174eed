def unavailable_reason(device_type):
    return "stub"


def register():
    pass
