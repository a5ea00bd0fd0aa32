/* kimi_linear._core: the C library under Python. Everything here is checked again in kimi_linear/ops,
 * where the documentation is; calling _core with nonsense raises and never crashes. */
#include "binding.h"

static PyObject *isa_list(PyObject *module, PyObject *args)
{
    (void)module;
    (void)args;
    const char *names[8];
    const int n = kl_isa_list(names, 8);
    PyObject *list = PyList_New(0);
    for (int i = 0; list != NULL && i < n; i++)
        kl_py_append(&list, PyUnicode_FromString(names[i]));
    return list;
}

static PyObject *blas_name(PyObject *module, PyObject *args)
{
    (void)module;
    (void)args;
    return PyUnicode_FromString(kl_blas_name());
}

/* [(name, available, description, reason, memory in bytes)] */
static PyObject *devices(PyObject *module, PyObject *args)
{
    (void)module;
    (void)args;
    kl_device_info row[64];
    int n = kl_device_list(row, 64);
    PyObject *list = PyList_New(0);
    for (int i = 0; list != NULL && i < n && i < 64; i++)
        kl_py_append(&list, Py_BuildValue("(sOssL)", row[i].name,
                                          row[i].available ? Py_True : Py_False, row[i].description,
                                          row[i].reason, (long long)row[i].memory_bytes));
    return list;
}

static PyMethodDef module_methods[] = {
    { "isa_list", isa_list, METH_NOARGS, "Instruction sets that run here, best last." },
    { "devices", devices, METH_NOARGS, "Devices, and why one is not there." },
    { "blas_name", blas_name, METH_NOARGS, "BLAS that this build uses, or 'none'." },
    { NULL, NULL, 0, NULL },
};

static bool add_type(PyObject *module, const char *name, PyType_Spec *spec)
{
    PyObject *type = PyType_FromModuleAndSpec(module, spec, NULL);
    const bool ok = type != NULL && PyModule_AddObjectRef(module, name, type) == 0;
    Py_XDECREF(type);
    return ok;
}

static int module_exec(PyObject *module)
{
    if (!add_type(module, "Context", &kl_py_context_spec)
        || !add_type(module, "Model", &kl_py_model_spec)
        || !add_type(module, "State", &kl_py_state_spec)
        || !add_type(module, "DeviceMemory", &kl_py_memory_spec))
        return -1;
    PyMethodDef *families[] = { kl_py_ops_basic, kl_py_ops_delta, kl_py_ops_dense,
                                kl_py_ops_kda,   kl_py_ops_mla,   kl_py_ops_quant };
    for (size_t i = 0; i < sizeof families / sizeof families[0]; i++)
        if (PyModule_AddFunctions(module, families[i]) < 0)
            return -1;
    return PyModule_AddStringConstant(module, "version", KL_VERSION);
}

static PyModuleDef_Slot slots[] = {
    { Py_mod_exec, module_exec },
    { 0, NULL },
};
static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "kimi_linear._core", .m_size = 0, .m_methods = module_methods,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__core(void) { return PyModuleDef_Init(&definition); }
