name = "{{ fileBasename }}-{{fileBasenameNoExtension}}{{fileExtname}}"
work_dir = "runs/{{fileBasenameNoExtension}}"
root = "{{$CONFIG_TEST_ROOT:/data/coco}}/images"
classes = {{'$CONFIG_TEST_CLASSES:80'}}
