"""Facts that the Chinese questions ask about, with the templates of the questions."""

from __future__ import annotations

from typing import NamedTuple


class Facts(NamedTuple):
    """Pairs of one relation.

    Attributes:
        forward: A question about the second text, with the first one as `{}`.
        backward: A question about the first text, with the second one as `{}`; empty if it has several answers.
        pairs: The pairs, written as `first second`; accepted spellings of a text have `/` between them.
    """

    forward: str
    backward: str
    pairs: tuple[tuple[str, str], ...]


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    found = [tuple(pair.split("-")) for pair in text.split()]
    return tuple((first, second) for first, second in found)


FACTS = (
    Facts(
        "{}的首都是哪座城市？",
        "{}是哪个国家的首都？",
        _pairs(
            "法国-巴黎 英国-伦敦 德国-柏林 意大利-罗马 西班牙-马德里 葡萄牙-里斯本 俄罗斯-莫斯科 日本-东京 韩国-首尔 "
            "泰国-曼谷 越南-河内 印度-新德里 埃及-开罗 加拿大-渥太华 澳大利亚-堪培拉 巴西-巴西利亚 阿根廷-布宜诺斯艾利斯 "
            "墨西哥-墨西哥城 古巴-哈瓦那 希腊-雅典 瑞典-斯德哥尔摩 挪威-奥斯陆 丹麦-哥本哈根 芬兰-赫尔辛基 奥地利-维也纳 "
            "波兰-华沙 匈牙利-布达佩斯 捷克-布拉格 土耳其-安卡拉 伊朗-德黑兰 伊拉克-巴格达 蒙古/蒙古国-乌兰巴托 "
            "朝鲜-平壤 菲律宾-马尼拉 马来西亚-吉隆坡 新西兰-惠灵顿 肯尼亚-内罗毕 秘鲁-利马 智利-圣地亚哥 爱尔兰-都柏林 "
            "比利时-布鲁塞尔 柬埔寨-金边 老挝-万象 尼泊尔-加德满都 巴基斯坦-伊斯兰堡 乌克兰-基辅"
        ),
    ),
    Facts(
        "中国{}的省会或首府是哪座城市？",
        "{}是中国哪个省或自治区的省会或首府？",
        _pairs(
            "四川-成都 浙江-杭州 江苏-南京 山东-济南 湖北-武汉 湖南-长沙 广东-广州 福建-福州 陕西-西安 辽宁-沈阳 吉林-长春 "
            "黑龙江-哈尔滨 河北-石家庄 河南-郑州 山西-太原 安徽-合肥 江西-南昌 云南-昆明 贵州-贵阳 甘肃-兰州 青海-西宁 "
            "海南-海口 西藏-拉萨 新疆-乌鲁木齐 内蒙古-呼和浩特 宁夏-银川 广西-南宁"
        ),
    ),
    Facts(
        "化学元素{}的元素符号是什么？",
        "元素符号{}表示哪种化学元素？",
        _pairs(
            "氢-H 氦-He 碳-C 氮-N 氧-O 钠-Na 镁-Mg 铝-Al 硅-Si 磷-P 硫-S 氯-Cl 钾-K 钙-Ca 铁-Fe 铜-Cu 锌-Zn 银-Ag 金-Au "
            "汞-Hg 铅-Pb 锡-Sn 碘-I 氟-F 氖-Ne"
        ),
    ),
    Facts(
        "《{}》的作者是谁？",
        "",
        _pairs(
            "红楼梦-曹雪芹 西游记-吴承恩 三国演义-罗贯中 水浒传-施耐庵 聊斋志异-蒲松龄 儒林外史-吴敬梓 史记-司马迁 "
            "本草纲目-李时珍 资治通鉴-司马光 骆驼祥子-老舍 家-巴金 子夜-茅盾 边城-沈从文 呐喊-鲁迅 围城-钱钟书/钱锺书 "
            "雷雨-曹禺 静夜思-李白 春望-杜甫 琵琶行-白居易 出师表-诸葛亮 桃花源记-陶渊明 岳阳楼记-范仲淹 醉翁亭记-欧阳修 "
            "哈姆雷特-莎士比亚 战争与和平-托尔斯泰 老人与海-海明威 悲惨世界-雨果"
        ),
    ),
    Facts(
        "{}的反义词（一个字）是什么？",
        "",
        _pairs("大-小 高-低/矮 长-短 黑-白 冷-热 快-慢 左-右 前-后 上-下 多-少 远-近 胖-瘦 轻-重 新-旧 进-退/出 买-卖"),
    ),
    Facts(
        "{}用阿拉伯数字怎么写？",
        "",
        _pairs(
            "二十三-23 四十七-47 五十六-56 八十九-89 一百零五-105 一百二十-120 三百一十二-312 四百零八-408 六百五十-650 "
            "九百九十九-999 一千零一-1001 两千三百-2300 五千零六十-5060 一万二千-12000"
        ),
    ),
)
