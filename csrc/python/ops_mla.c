#include "binding.h"

PyMethodDef kl_py_ops_mla[] = {
    { NULL, NULL, 0, NULL },
};
