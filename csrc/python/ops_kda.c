#include "binding.h"

PyMethodDef kl_py_ops_kda[] = {
    { NULL, NULL, 0, NULL },
};
