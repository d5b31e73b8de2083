"""Makes `kappatune` a method that PEFT knows.

PEFT has `register_peft_method` for methods from outside, but its list of types is a closed enum, so a member has to be
made by hand first.
"""

from peft.utils.peft_types import PeftType

from kappatune_plugin.version import NAME

PREFIX = "kappatune_"


def register_peft_type() -> PeftType:
    """The enum member of the method, made on the first call."""
    name = NAME.upper()
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_ = member._value_ = name
        member._sort_order_ = len(PeftType.__members__)
        PeftType._member_map_[name] = member
        PeftType._member_names_.append(name)
        PeftType._value2member_map_[name] = member
        # Python 3.11 and later look members up as attributes of the class, earlier ones in the map
        type.__setattr__(PeftType, name, member)
    return PeftType(name)


def register(config_class: type, model_class: type) -> None:
    """Register the method's classes with PEFT; a second call does nothing."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import register_peft_method

    if register_peft_type() not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=NAME, config_cls=config_class, model_cls=model_class, prefix=PREFIX)
